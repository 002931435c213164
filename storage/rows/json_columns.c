/* Rows of JSON bodies straight into the buffers of Arrow columns.
 *
 * Called through ctypes by storage/rows/compiled_json.py, which owns every buffer named here and
 * says what is in them. Bodies lie one after the other, each followed by a NUL, the last by 64
 * of them. No JSON text holds a NUL, so every loop over bytes ends at one; what looks ahead without
 * looking at each byte stays within the padding, and what it writes ahead within some slack.
 *
 * As strict as storage/rows/cells.py and stricter: whatever is unusual (a number with an exponent
 * in an integer or decimal, a key that is written with escapes, a fraction finer than its column)
 * is refused as a whole body, and the caller's other readers decide. A refused body leaves nothing
 * behind. Nothing is allocated, nothing is global, nothing depends on the locale.
 */

#include "json_values.h"

#define LAYOUT 1 /* of the structs below; compiled_json.py asks for the same */

struct table {
    int64_t columns;
    const struct column *column;
    const uint8_t *names;
};

/* Steps: from the buffer of one column to that of the next, in values. */
struct space {
    int64_t rows; /* for which there is room */
    uint8_t *fixed; /* values of fixed width */
    int64_t fixed_step;
    uint8_t *valid; /* a byte a value */
    int64_t valid_step;
    int32_t *ends; /* where each text ends, behind a first 0 */
    int64_t ends_step;
    uint8_t *texts;
    int64_t texts_step;
    int64_t *order;     /* of the columns in the row before; any, but of this table */
    int64_t *stamp;     /* number of the last row that had a column */
    int64_t rows_read;  /* of all calls with this space */
    int64_t *body_ends; /* in: where bodies end in the data */
    uint8_t *lines;     /* in: whether a body holds an object a line */
    int64_t *row_ends;  /* out: how many rows there are after a body, -1: it is refused */
    int64_t *nulls;     /* out: how many each column has in all rows that are left */
};

struct reader {
    const uint8_t *at, *limit; /* limit: of what may be looked at */
    const struct table *table;
    struct space *space;
    int64_t row;
    int lines;
};

static inline void store(uint8_t *to, int64_t width, int64_t row, int64_t value) {
    switch (width) {
    case 1: ((int8_t *)to)[row] = (int8_t)value; break;
    case 2: ((int16_t *)to)[row] = (int16_t)value; break;
    case 4: ((int32_t *)to)[row] = (int32_t)value; break;
    case 8: ((int64_t *)to)[row] = value; break;
    default:
        ((int64_t *)to)[2 * row] = value;
        ((int64_t *)to)[2 * row + 1] = value >> 63;
    }
}

static void store_null(struct reader *reader, int64_t number) {
    const struct column *column = &reader->table->column[number];
    struct space *space = reader->space;
    space->valid[number * space->valid_step + reader->row] = 0;
    if (column->width) {
        store(space->fixed + number * space->fixed_step, column->width, reader->row, 0);
    } else {
        int32_t *ends = space->ends + column->text * space->ends_step + reader->row;
        ends[1] = ends[0];
    }
}

/* The value of a column in the current row; whether it fits. */
static int read_value(struct reader *reader, int64_t number_of_column) {
    const struct column *column = &reader->table->column[number_of_column];
    struct space *space = reader->space;
    const uint8_t *at = reader->at;
    if (*at == 'n') {
        if (!column->nullable || at[1] != 'u' || at[2] != 'l' || at[3] != 'l') return 0;
        store_null(reader, number_of_column);
        reader->at = at + 4;
        return 1;
    }
    space->valid[number_of_column * space->valid_step + reader->row] = 1;
    if (!column->width) {
        int32_t *ends = space->ends + column->text * space->ends_step + reader->row;
        uint8_t *texts = space->texts + column->text * space->texts_step;
        uint8_t *out = texts + ends[0];
        if (column->family == VARCHAR) {
            if (*at != '"') return 0;
            at = text(at + 1, &out);
        } else {
            const uint8_t *end = number(at);
            if (end != NULL) memcpy(out, at, (size_t)(end - at));
            if (end != NULL) out += end - at;
            at = end;
        }
        if (at == NULL) return 0;
        ends[1] = (int32_t)(out - texts);
        reader->at = at;
        return 1;
    }
    int64_t value = 0;
    int quoted = *at == '"';
    switch (column->family) {
    case INTEGER:
        if (quoted && !column->text_allowed) return 0;
        at = integer(at + quoted, column, &value);
        break;
    case DECIMAL:
        at = decimal(at + quoted, column, &value);
        break;
    case BOOLEAN:
        quoted = 0;
        value = *at == 't';
        if (value ? memcmp(at, "true", 4) : memcmp(at, "false", 5)) return 0;
        at += value ? 4 : 5;
        break;
    default:
        quoted = 0;
        at = moment(at, column->family, &value);
    }
    if (at == NULL || (quoted && *at++ != '"')) return 0;
    store(space->fixed + number_of_column * space->fixed_step, column->width, reader->row, value);
    reader->at = at;
    return 1;
}

/* Names of columns have no character that JSON would escape. */
static inline int is_key(const struct reader *reader, int64_t number) {
    const struct column *column = &reader->table->column[number];
    int64_t length = column->name_end - column->name_start;
    return length < reader->limit - reader->at && reader->at[length] == '"' &&
           !memcmp(reader->at, reader->table->names + column->name_start, (size_t)length);
}

/* The column of the key here, -1 when it is none; `place`: of the key in the row. */
static int64_t find_column(struct reader *reader, int64_t place) {
    int64_t columns = reader->table->columns, *order = reader->space->order;
    if (place < columns && is_key(reader, order[place])) return order[place];
    for (int64_t number = 0; number < columns; number++)
        if (is_key(reader, number)) {
            if (place < columns) order[place] = number;
            return number;
        }
    return -1;
}

/* One object, from its brace to behind the other one; whether it is a row. */
static int read_row(struct reader *reader) {
    const struct table *table = reader->table;
    int64_t place = 0, stamp = ++reader->space->rows_read, *stamps = reader->space->stamp;
    if (*reader->at != '{') return 0;
    reader->at = blank(reader->at + 1, reader->lines);
    if (*reader->at == '}') {
        reader->at++;
    } else {
        for (;; place++) {
            if (*reader->at++ != '"') return 0;
            int64_t number = find_column(reader, place);
            if (number < 0 || stamps[number] == stamp) return 0; /* unknown, or twice */
            const struct column *column = &table->column[number];
            stamps[number] = stamp;
            reader->at += column->name_end - column->name_start + 1;
            reader->at = blank(reader->at, reader->lines);
            if (*reader->at++ != ':') return 0;
            reader->at = blank(reader->at, reader->lines);
            if (!read_value(reader, number)) return 0;
            reader->at = blank(reader->at, reader->lines);
            if (*reader->at == '}') break;
            if (*reader->at++ != ',') return 0;
            reader->at = blank(reader->at, reader->lines);
        }
        reader->at++;
        place++;
    }
    if (place < table->columns)
        for (int64_t number = 0; number < table->columns; number++)
            if (stamps[number] != stamp) {
                if (!table->column[number].nullable) return 0;
                store_null(reader, number);
            }
    return 1;
}

/* A whole body; whether all of it could be read. `rows_end`: one behind the last row it may have. */
static int read_body(struct reader *reader, const uint8_t *end, int64_t rows_end) {
    reader->at = blank(reader->at, reader->lines);
    int array = !reader->lines && *reader->at == '[';
    if (array) reader->at = blank(reader->at + 1, 0);
    for (;;) {
        if (reader->row >= rows_end || !read_row(reader)) return 0;
        reader->row++;
        reader->at = blank(reader->at, reader->lines);
        if (array && *reader->at == ',') {
            reader->at = blank(reader->at + 1, 0);
        } else if (array) {
            return *reader->at == ']' && blank(reader->at + 1, 0) == end;
        } else if (reader->lines && *reader->at == '\n') {
            reader->at = blank(reader->at + 1, 1);
            if (reader->at == end) return 1;
        } else {
            return reader->at == end;
        }
    }
}

int64_t json_columns_layout(void) { return LAYOUT; }

/* Reads `bodies` bodies of `rows_max` rows each at most, which are for one table. */
void json_columns(const uint8_t *data, int64_t data_bytes, int64_t bodies, int64_t rows_max,
                  const struct table *table, struct space *space) {
    struct reader reader = {data, data + data_bytes, table, space, 0, 0};
    const uint8_t *start = data;
    for (int64_t body = 0; body < bodies; body++) {
        int64_t first = reader.row, room = space->rows - first;
        const uint8_t *end = data + space->body_ends[body];
        reader.at = start;
        reader.lines = space->lines[body];
        if (!read_body(&reader, end, first + (rows_max < room ? rows_max : room))) {
            reader.row = first;
            space->row_ends[body] = -1;
        } else {
            space->row_ends[body] = reader.row;
        }
        start = end + 1;
    }
    for (int64_t number = 0; number < table->columns; number++) {
        const uint8_t *valid = space->valid + number * space->valid_step;
        int64_t present = 0;
        for (int64_t row = 0; row < reader.row; row++) present += valid[row];
        space->nulls[number] = reader.row - present;
    }
}

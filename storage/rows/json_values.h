/* JSON values as the values of columns: one function a kind of value.
 *
 * Each takes where a value begins and gives where it ends, or NULL (or 0) for one that it does not
 * take; then nobody looks at what it may have written. Text ends with a NUL and some bytes more, as
 * json_columns.c says.
 */

#ifndef LAKEBUS_JSON_VALUES_H
#define LAKEBUS_JSON_VALUES_H

#include <stdint.h>
#include <string.h>

enum family { BOOLEAN, INTEGER, FLOAT, DECIMAL, VARCHAR, DATE, TIMESTAMP, TIMESTAMPTZ };

struct column {
    int64_t family, nullable, text_allowed;
    int64_t low, high, scale; /* of integers; of decimals the largest magnitude and the scale */
    int64_t width;            /* bytes of a value, 0 for texts */
    int64_t text;             /* which of the text buffers */
    int64_t name_start, name_end;
};

static const int64_t POWERS[19] = {
    1LL, 10LL, 100LL, 1000LL, 10000LL, 100000LL, 1000000LL, 10000000LL, 100000000LL, 1000000000LL,
    10000000000LL, 100000000000LL, 1000000000000LL, 10000000000000LL, 100000000000000LL,
    1000000000000000LL, 10000000000000000LL, 100000000000000000LL, 1000000000000000000LL};

/* A line feed ends a row where there is one a line, so it is no white space there. */
static inline const uint8_t *blank(const uint8_t *at, int lines) {
    while (*at == ' ' || *at == '\t' || *at == '\r' || (*at == '\n' && !lines)) at++;
    return at;
}

static inline int is_digit(uint8_t byte) { return (uint8_t)(byte - '0') < 10; }

static inline int hex_digit(uint8_t byte) {
    if (is_digit(byte)) return byte - '0';
    byte |= 0x20;
    return byte >= 'a' && byte <= 'f' ? byte - 'a' + 10 : -1;
}

/* Four hexadecimal digits, or -1. */
static int32_t hex4(const uint8_t *at) {
    int32_t code = 0;
    for (int n = 0; n < 4; n++) {
        int digit = hex_digit(at[n]);
        if (digit < 0) return -1;
        code = code << 4 | digit;
    }
    return code;
}

/* An escape, from its backslash. Both ends move on. Not for \u0000 nor half a surrogate pair. */
static int escape(const uint8_t **from, uint8_t **to) {
    const uint8_t *at = *from + 1;
    uint8_t *out = *to;
    int32_t code;
    switch (*at) {
    case '"': case '\\': case '/': code = *at; break;
    case 'b': code = 8; break;
    case 'f': code = 12; break;
    case 'n': code = 10; break;
    case 'r': code = 13; break;
    case 't': code = 9; break;
    case 'u':
        code = hex4(at + 1);
        if (code <= 0) return 0;
        at += 4;
        if (code >= 0xD800 && code <= 0xDFFF) {
            if (code >= 0xDC00 || at[1] != '\\' || at[2] != 'u') return 0;
            int32_t low = hex4(at + 3);
            if (low < 0xDC00 || low > 0xDFFF) return 0;
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            at += 6;
        }
        break;
    default: return 0;
    }
    if (code < 0x80) {
        *out++ = (uint8_t)code;
    } else if (code < 0x800) {
        *out++ = (uint8_t)(0xC0 | code >> 6);
        *out++ = (uint8_t)(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        *out++ = (uint8_t)(0xE0 | code >> 12);
        *out++ = (uint8_t)(0x80 | (code >> 6 & 0x3F));
        *out++ = (uint8_t)(0x80 | (code & 0x3F));
    } else {
        *out++ = (uint8_t)(0xF0 | code >> 18);
        *out++ = (uint8_t)(0x80 | (code >> 12 & 0x3F));
        *out++ = (uint8_t)(0x80 | (code >> 6 & 0x3F));
        *out++ = (uint8_t)(0x80 | (code & 0x3F));
    }
    *from = at + 1;
    *to = out;
    return 1;
}

/* How many bytes a character of several has, 0 when they are no UTF-8. */
static int utf8_length(const uint8_t *at) {
    uint8_t first = at[0], low = 0x80, high = 0xBF;
    int length;
    if (first < 0xC2) return 0;
    if (first < 0xE0) length = 2;
    else if (first < 0xF0) length = 3;
    else if (first < 0xF5) length = 4;
    else return 0;
    if (first == 0xE0) low = 0xA0;
    if (first == 0xED) high = 0x9F;
    if (first == 0xF0) low = 0x90;
    if (first == 0xF4) high = 0x8F;
    if (at[1] < low || at[1] > high) return 0;
    for (int n = 2; n < length; n++)
        if ((at[n] & 0xC0) != 0x80) return 0;
    return length;
}

#define EACH(byte) (0x0101010101010101ULL * (byte))

/* Whether some of eight bytes end a text, are part of an escape, or are no plain ASCII. */
static inline uint64_t unusual(uint64_t eight) {
    uint64_t quote = eight ^ EACH('"'), slash = eight ^ EACH('\\');
    return ((eight - EACH(0x20)) | (quote - EACH(1)) | (slash - EACH(1)) | eight) & EACH(0x80);
}

/* A text from behind its quote to behind the other one, or NULL. */
static const uint8_t *text(const uint8_t *at, uint8_t **to) {
    uint8_t *out = *to;
    for (;;) {
        uint64_t eight;
        memcpy(&eight, at, 8);
        if (!unusual(eight)) {
            memcpy(out, &eight, 8);
            at += 8;
            out += 8;
            continue;
        }
        /* At least one of the eight is unusual (or borrowed from one); each is looked at. */
        for (int n = 0; n < 8; n++) {
            uint8_t byte = *at;
            if (byte == '"') {
                *to = out;
                return at + 1;
            }
            if (byte < 0x20) return NULL;
            if (byte == '\\') {
                if (!escape(&at, &out)) return NULL;
            } else if (byte < 0x80) {
                *out++ = byte;
                at++;
            } else {
                int length = utf8_length(at);
                if (!length) return NULL;
                memcpy(out, at, 4);
                at += length;
                out += length;
            }
        }
    }
}

/* Digits without needless zeros, at most 18 after `value`; how many there are. */
static inline int digits(const uint8_t **from, int64_t *value) {
    const uint8_t *at = *from;
    uint64_t sum = (uint64_t)*value;
    while (is_digit(*at)) sum = sum * 10 + (*at++ - '0');
    int64_t count = at - *from;
    *from = at;
    *value = (int64_t)sum;
    return count > 1000 ? 1000 : (int)count;
}

static const uint8_t *integer(const uint8_t *at, const struct column *column, int64_t *value) {
    int negative = *at == '-';
    at += negative;
    const uint8_t *start = at;
    *value = 0;
    int count = digits(&at, value);
    /* Nineteen digits never wrap around 64 bits without a sign. */
    if (count == 0 || count > 19 || *value < 0 || (count > 1 && *start == '0')) return NULL;
    if (negative) *value = -*value;
    return *value < column->low || *value > column->high ? NULL : at;
}

static const uint8_t *decimal(const uint8_t *at, const struct column *column, int64_t *value) {
    int negative = *at == '-';
    at += negative;
    const uint8_t *start = at;
    *value = 0;
    int64_t whole = digits(&at, value), fraction = 0;
    if (whole == 0 || (whole > 1 && *start == '0')) return NULL;
    if (*at == '.') {
        at++;
        fraction = digits(&at, value);
        if (fraction == 0) return NULL;
    }
    if (fraction > column->scale || whole + column->scale > 18) return NULL;
    *value *= POWERS[column->scale - fraction];
    if (*value > column->high) return NULL;
    if (negative) *value = -*value;
    return at;
}

/* Behind a JSON number, or NULL. Only for numbers that some double is near to, which those of so
 * few digits are. Not for -0, which is zero here and a sign elsewhere. */
static const uint8_t *number(const uint8_t *at) {
    const uint8_t *start = at;
    at += *at == '-';
    const uint8_t *whole = at;
    while (is_digit(*at)) at++;
    if (at == whole || at - whole > 100 || (at - whole > 1 && *whole == '0')) return NULL;
    const uint8_t *end = at;
    if (*at == '.') {
        const uint8_t *fraction = ++at;
        while (is_digit(*at)) at++;
        if (at == fraction || at - fraction > 100) return NULL;
    }
    if ((*at | 0x20) == 'e') {
        at++;
        at += *at == '+' || *at == '-';
        const uint8_t *exponent = at;
        while (is_digit(*at)) at++;
        if (at == exponent || at - exponent > 2) return NULL;
    }
    return at == end && *start == '-' && *whole == '0' ? NULL : at;
}

/* Two digits, or -1000000. */
static inline int64_t two(const uint8_t *at) {
    return is_digit(at[0]) && is_digit(at[1]) ? (at[0] - '0') * 10 + (at[1] - '0') : -1000000;
}

/* The day at 2026-01-31, counted from 1970, of the proleptic Gregorian calendar. */
static int day(const uint8_t *at, int64_t *days) {
    static const uint8_t LAST[13] = {0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    int64_t year = two(at) * 100 + two(at + 2);
    if (year < 1 || at[4] != '-') return 0;
    int64_t month = two(at + 5);
    if (month < 1 || month > 12 || at[7] != '-') return 0;
    int64_t of_month = two(at + 8);
    int leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    if (of_month < 1 || of_month > LAST[month] + (leap && month == 2)) return 0;
    /* Years from March, so that the day that some lack is the last one. */
    int64_t from_march = month > 2 ? month - 3 : month + 9;
    year -= month <= 2;
    int64_t before = 365 * year + year / 4 - year / 100 + year / 400;
    *days = before + (153 * from_march + 2) / 5 + of_month - 1 - 719468;
    return 1;
}

/* Behind 12:00:00 and perhaps a fraction of at most six digits, or NULL. */
static const uint8_t *clock_time(const uint8_t *at, int64_t *us) {
    int64_t hour = two(at);
    if (hour < 0 || hour > 23 || at[2] != ':') return NULL;
    int64_t minute = two(at + 3);
    if (minute < 0 || minute > 59 || at[5] != ':') return NULL;
    int64_t second = two(at + 6);
    if (second < 0 || second > 59) return NULL;
    int64_t fraction = 0;
    at += 8;
    if (*at == '.') {
        at++;
        int count = digits(&at, &fraction);
        if (count == 0 || count > 6) return NULL;
        fraction *= POWERS[6 - count];
    }
    *us = ((hour * 60 + minute) * 60 + second) * 1000000 + fraction;
    return at;
}

#define DAY_US 86400000000LL
#define FIRST_US (-719162 * DAY_US)
#define LAST_US (2932897 * DAY_US - 1)

/* A date or a time in its quotes; behind them, or NULL. */
static const uint8_t *moment(const uint8_t *at, int64_t family, int64_t *value) {
    int64_t us = 0;
    if (*at != '"' || !day(at + 1, value)) return NULL;
    at += 11;
    if (family == DATE) return *at == '"' ? at + 1 : NULL;
    if (*at != 'T' && *at != ' ') return NULL;
    at = clock_time(at + 1, &us);
    if (at == NULL) return NULL;
    *value = *value * DAY_US + us;
    if (family == TIMESTAMPTZ) {
        if (*at == 'Z') {
            at++;
        } else {
            int64_t sign = *at == '+' ? 1 : *at == '-' ? -1 : 0;
            if (!sign) return NULL;
            int64_t hours = two(at + 1);
            if (hours < 0 || hours > 23 || at[3] != ':') return NULL;
            int64_t minutes = two(at + 4);
            if (minutes < 0 || minutes > 59) return NULL;
            *value -= sign * (hours * 60 + minutes) * 60000000LL;
            if (*value < FIRST_US || *value > LAST_US) return NULL;
            at += 6;
        }
    }
    return *at == '"' ? at + 1 : NULL;
}

#endif

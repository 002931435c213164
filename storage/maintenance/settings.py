"""What an operator tunes about maintenance, in one frozen object that every job takes."""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class MaintenanceSettings:
    """Times are by the database's clock.

    :param target_file_bytes: size that compaction makes files of.
    :param small_file_bytes: live files below it are to be merged; at most `small_files_max` of them
        stay in a table at steady state.
    :param small_files_max: bound on live files below `small_file_bytes` of one table.
    :param inputs_min: fewer files than this of one tier are not worth a rewrite.
    :param inputs_max: files of one rewrite at most.
    :param input_bytes_max: bytes of one rewrite at most.
    :param tier_factor: files within this factor of each other in size are one tier.
    :param rewrite_memory_bytes: memory of one rewrite's sort; beyond it the sort spills.
    :param rewrite_threads: threads of one rewrite.
    :param snapshot_keep_s, snapshot_keep_count: a snapshot expires when it is older AND beyond so
        many newer ones (E8).
    :param safety_window_s: how long a file stays condemned before it may be deleted (E3).
    :param orphan_window_s: how long after its intent's expiry an unreferenced file is an orphan.
    :param intent_ttl_s: how long a write intent of a job protects its files.
    :param deletes_max: files one collection deletes at most.
    :param expire_max: snapshots one expiry ends at most.
    :param deleted_keep_s: how long the record of a deleted file is kept.
    :param sample_files: data files whose contents a sampling validation reads.
    """

    target_file_bytes: int = 128 * _MIB
    small_file_bytes: int = 8 * _MIB
    small_files_max: int = 64
    inputs_min: int = 8
    inputs_max: int = 2_000
    input_bytes_max: int = 1024 * _MIB
    tier_factor: int = 8
    rewrite_memory_bytes: int = 512 * _MIB
    rewrite_threads: int = 1
    snapshot_keep_s: float = 7 * 86_400.0
    snapshot_keep_count: int = 1_000
    safety_window_s: float = 3_600.0
    orphan_window_s: float = 86_400.0
    intent_ttl_s: float = 3_600.0
    deletes_max: int = 10_000
    expire_max: int = 100_000
    deleted_keep_s: float = 30 * 86_400.0
    sample_files: int = 200

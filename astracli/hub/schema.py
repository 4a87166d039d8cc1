"""The hub's SQLite file: its tables, how it is opened, and one connection behind one lock.

WAL with synchronous=NORMAL: a commit survives the death of the process at any instant (not a power cut), and anyone can
open the file and look while a run goes on.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from astracli.errors import UserError

SCHEMA_VERSION = 6
PAGE_BYTES = 16 << 10
"""A group of long completions is hundreds of kilobytes in one value: fewer pages to read, and to free again."""
LOG_BYTES = 64 << 20
"""What the write-ahead log keeps of the disk between checkpoints of the database."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);

-- One row a lease. state: queued (to be granted again), leased, kept (waits for a batch), assigned (in a batch),
-- dropped (no signal), expired (too old for any batch), skipped (no prompt that can be generated from).
CREATE TABLE groups (
    lease_id INTEGER PRIMARY KEY,
    state TEXT NOT NULL,
    worker TEXT,
    version INTEGER,      -- leased: the engine's version at the grant; later: version of the oldest token
    step INTEGER,         -- the (last) batch it is in
    replays INTEGER NOT NULL DEFAULT 0,  -- how often it was put into a batch again
    arrived INTEGER,      -- the next step without a batch when it came in
    place INTEGER,        -- in the order of arrival
    reward_mean REAL,
    samples INTEGER,
    tokens INTEGER,
    timeouts INTEGER,
    errors INTEGER,       -- samples whose grading failed
    no_answer INTEGER,    -- samples in which the grader found no answer
    truncated INTEGER,    -- samples cut off at the token limit
    parts TEXT,           -- JSON {name of a reward: [sum, samples]}; NULL without any
    reason TEXT,          -- why it was skipped
    prompt INTEGER,       -- its place in the endless sequence of prompts
    kind TEXT,            -- with a curriculum: what its solve rate is counted under
    source TEXT           -- of several training sources, the one that its problem is from
);
CREATE INDEX groups_by_state ON groups (state, version);
CREATE INDEX groups_by_arrival ON groups (arrived);
CREATE INDEX groups_by_kind ON groups (kind, lease_id) WHERE kind IS NOT NULL;
CREATE INDEX groups_with_timeouts ON groups (timeouts) WHERE timeouts > 0;
CREATE INDEX groups_with_errors ON groups (errors) WHERE errors > 0;

CREATE TABLE blobs (lease_id INTEGER PRIMARY KEY, blob BLOB NOT NULL);

-- lease_ids: JSON list, in the order in which they are served. replay_of: the step that first trained on these groups;
-- NULL for new groups. pruned: the blobs are gone.
CREATE TABLE batches (
    step INTEGER PRIMARY KEY,
    lease_ids TEXT NOT NULL,
    stats TEXT NOT NULL,
    replay_of INTEGER,
    acked INTEGER NOT NULL DEFAULT 0,
    version INTEGER,
    pruned INTEGER NOT NULL DEFAULT 0
);

CREATE INDEX batches_with_blobs ON batches (step) WHERE pruned = 0;

-- The newest announced version alone.
CREATE TABLE versions (version INTEGER PRIMARY KEY, step INTEGER NOT NULL);

-- step, version: what is evaluated; NULL while an earlier evaluation runs. served: every sample is on disk, no engine
-- is needed any more. results: JSON; NULL until it is done.
CREATE TABLE evals (
    due_step INTEGER PRIMARY KEY,
    step INTEGER UNIQUE,
    version INTEGER,
    served INTEGER NOT NULL DEFAULT 0,
    results TEXT
);
"""

AMONG = "lease_id IN (SELECT value FROM json_each(?))"
"""A condition: the lease is in a JSON list, the form in which `batches.lease_ids` keeps them."""


class Database:
    """A connection with a lock. Reads go through `rows`, `one` and `scalar`; writes through `transaction`."""

    def __init__(self, path: Path):
        """Open or create. Raises UserError when the file is no hub database or of another schema."""
        self.lock = threading.RLock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10.0)
        try:
            self._connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(f"PRAGMA journal_size_limit={LOG_BYTES}")
            # some builds overwrite what is deleted with zeros: every byte of every sample written once more
            self._connection.execute("PRAGMA secure_delete=OFF")
            with self.transaction():
                found = self._open_schema()
            said = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if said != "ok":
                raise sqlite3.DatabaseError(f"it is damaged: {said}")
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"`{path}` is not a hub database: {error}",
                "put a whole copy there, or start a new run from this one's weights: `astra train --from RUN_DIR`",
            ) from None
        if found != SCHEMA_VERSION:
            raise UserError(
                f"`{path}` has schema {found}, this astra reads {SCHEMA_VERSION}",
                "resume the run with the version of astra that made it",
            )

    def _open_schema(self) -> int:
        if self.one("SELECT name FROM sqlite_master WHERE name = 'meta'") is None:
            for statement in TABLES.split(";\n"):
                self._connection.execute(statement)
            self.set_meta("schema_version", SCHEMA_VERSION)
        return self.meta("schema_version")

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.lock:
            return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        with self.lock:
            row: tuple[Any, ...] | None = self._connection.execute(sql, values).fetchone()
            return row

    def scalar(self, sql: str, *values: Any) -> int:
        """The single integer of a query that always has one row."""
        row = self.one(sql, *values)
        assert row is not None
        return int(row[0])

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, under the lock. Not nested."""
        with self.lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def meta(self, key: str) -> int:
        """A counter; 0 when it was never set."""
        row = self.one("SELECT value FROM meta WHERE key = ?", key)
        return int(row[0]) if row else 0

    def set_meta(self, key: str, value: int) -> None:
        """Inside a transaction of the caller."""
        self._connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

    def close(self) -> None:
        with self.lock:
            self._connection.close()

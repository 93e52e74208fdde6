-- The audit. weir applies this under an advisory lock and notes its number in weir.schema_version.

CREATE TABLE weir.audit_boots (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    boot uuid NOT NULL UNIQUE,
    instance text NOT NULL,
    started timestamptz NOT NULL,
    -- Tells the key of its hash chain from others; null without one.
    key_check bytea,
    -- Retention has removed the events up to this number, whose batch has this hash; the mark proves that.
    removed_to bigint NOT NULL DEFAULT 0,
    removed_hash bytea,
    removed_mark bytea
);

-- Batches decide what is stored: an event is here once its batch is, in one transaction.
CREATE TABLE weir.audit_batches (
    day date NOT NULL,
    boot_id integer NOT NULL,
    -- The numbers of its first and last event; an end mark has none, and `last` is `first - 1`.
    first bigint NOT NULL,
    last bigint NOT NULL,
    sealed timestamptz NOT NULL,
    stored timestamptz NOT NULL DEFAULT now(),
    -- The transaction that stored it, as in its events.
    arrival bigint NOT NULL,
    -- Events of the boot so far that were dropped before they had a number.
    dropped bigint NOT NULL,
    is_end boolean NOT NULL,
    before bytea NOT NULL,
    hash bytea NOT NULL,
    -- An end mark that another process made, since the boot was killed, must not keep out a batch that was still on its way.
    PRIMARY KEY (boot_id, first, is_end, day)
) PARTITION BY RANGE (day);

-- One row for some 200 events: by it queries of the events find where to look.
CREATE INDEX audit_batches_arrival ON weir.audit_batches (arrival);

CREATE TABLE weir.audit_events (
    -- The day of its batch: never before that of `time`.
    day date NOT NULL,
    boot_id integer NOT NULL,
    -- Its number within the boot.
    seq bigint NOT NULL,
    time timestamptz NOT NULL,
    client inet NOT NULL,
    -- By bytes: an index in a language's order is wrong once the system's libraries have another one.
    username text COLLATE "C",
    -- Why weir answered in the upstream's place.
    label text,
    route text,
    method text NOT NULL,
    path text NOT NULL,
    status smallint NOT NULL,
    -- The transaction that stored it: the order of arrival.
    arrival bigint NOT NULL,
    -- The other fields as weir encodes them: `weir audit` reads them.
    detail bytea NOT NULL
) PARTITION BY RANGE (day);

-- Small and cheap to keep up while a day is written. The worker adds a b-tree by user to a partition whose day is over.
CREATE INDEX audit_events_brin ON weir.audit_events
    USING brin (time, arrival, username text_bloom_ops (n_distinct_per_range = 500))
    WITH (pages_per_range = 64, autosummarize = on);

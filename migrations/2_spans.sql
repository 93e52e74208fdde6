-- Which days the batches are of that arrived within each span of 2^17 transactions: a query asks here which partitions it is to look at.
-- One that named them all would lock every table and index of every day, of which a server has room for some 6,400 together.

CREATE TABLE weir.audit_spans (
    -- Their arrival, without its last 17 bits.
    span bigint NOT NULL,
    day date NOT NULL,
    PRIMARY KEY (span, day)
);

CREATE FUNCTION weir.note_spans() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- In order, so that two transactions never wait for each other.
    INSERT INTO weir.audit_spans SELECT DISTINCT arrival >> 17, day FROM added ORDER BY 1, 2 ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;

-- By the server, not the worker: a worker of an earlier weir may still write while others are brought up to date.
CREATE TRIGGER note_spans AFTER INSERT ON weir.audit_batches REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION weir.note_spans();

INSERT INTO weir.audit_spans SELECT DISTINCT arrival >> 17, day FROM weir.audit_batches;

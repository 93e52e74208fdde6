-- Puts a batch of audit events into a stream, unless that is full.
--
-- KEYS    1 the stream
-- ARGV    1 entries that it may hold
--         2 the batch
-- reply   the entry's id, or false where the stream is full
--
-- Atomic, so that the bound is looked at and kept in one step: a stream is refused more, and never trimmed.

if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return false end
return redis.call('XADD', KEYS[1], '*', 'b', ARGV[2])

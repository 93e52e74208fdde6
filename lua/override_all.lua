-- All overrides of limits, which are kept for as long as someone looks.
--
-- KEYS    1 the overrides: a hash of `["LIMIT","KEY"]` to the limit in words
-- ARGV    1 ms for which they are kept unless someone looks again
-- reply   the hash, names and values in turn
--
-- One key, one slot.

redis.call('PEXPIRE', KEYS[1], ARGV[1])
return redis.call('HGETALL', KEYS[1])

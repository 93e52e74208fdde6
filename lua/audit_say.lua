-- Notes which batches of a boot are committed, for audit_done.lua to tell.
--
-- KEYS    1 what is done of the boot: a hash of first by last number
-- ARGV    1 seconds that it is kept from now on
--         2… first and last number in turn
-- reply   1
--
-- A script, since HSET alone is refused by a Redis that is full, and what is not said is sent again. Scripts are let go on behind a write
-- that takes no memory, as the first EXPIRE is.

redis.call('EXPIRE', KEYS[1], ARGV[1])
-- A call takes some thousand arguments.
for first = 2, #ARGV, 1000 do
  redis.call('HSET', KEYS[1], unpack(ARGV, first, math.min(first + 999, #ARGV)))
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1

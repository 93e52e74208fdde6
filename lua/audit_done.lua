-- Says which batches of a boot are committed, and forgets those that its process has taken note of.
--
-- KEYS    1 what is done of the boot, as in audit_say.lua
-- ARGV    1… first numbers that the process knows of
-- reply   the rest: first and last number in turn
--
-- Atomic, so that what is noted between the two steps is not lost.

-- A call takes some thousand arguments.
for first = 1, #ARGV, 1000 do
  redis.call('HDEL', KEYS[1], unpack(ARGV, first, math.min(first + 999, #ARGV)))
end
return redis.call('HGETALL', KEYS[1])

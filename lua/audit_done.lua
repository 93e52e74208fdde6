-- Says which batches of a process are committed, and forgets those that it has taken note of.
--
-- KEYS[1]  what workers noted for the boot: a hash of first by last number
-- ARGV     first numbers that the process knows of
-- reply    the rest: first and last number in turn
-- tag      the boot
--
-- One script, so that what is noted between the two steps is not lost.
for at = 1, #ARGV, 1000 do
    redis.call('HDEL', KEYS[1], unpack(ARGV, at, math.min(at + 999, #ARGV)))
end
return redis.call('HGETALL', KEYS[1])

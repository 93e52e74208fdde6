-- Lets go of entries of an audit stream whose rows are committed.
--
-- KEYS    1 the stream
-- ARGV    1 the consumer group
--         2… the entries' ids
-- reply   entries that were still there
--
-- Atomic, since an entry that is acknowledged and not deleted would stay for ever: no consumer is given it again.

local deleted = 0
-- A call takes some thousand arguments.
for first = 2, #ARGV, 1000 do
  local last = math.min(first + 999, #ARGV)
  redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, first, last))
  deleted = deleted + redis.call('XDEL', KEYS[1], unpack(ARGV, first, last))
end
return deleted

-- Forgets consumers of an audit stream that are gone: idle for long, and with no entry left to be taken over.
--
-- KEYS    1 the stream
-- ARGV    1 the consumer group
--         2 ms for which a consumer that is gone has asked for nothing
-- reply   how many
--
-- Atomic, since entries that a consumer has when it is deleted are given to no one any more.

local gone = 0
for _, fields in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #fields, 2 do consumer[fields[i]] = fields[i + 1] end
  if consumer.pending == 0 and consumer.idle >= tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    gone = gone + 1
  end
end
return gone

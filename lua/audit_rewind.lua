-- Has the group of an audit stream read it from the start again, where the oldest entry was passed by: no consumer has it, and none would be
-- given it any more.
--
-- KEYS    1 the stream
-- ARGV    1 the consumer group
-- reply   1 if so, else 0
--
-- Weirs let go of entries in one step with their removal, so that only an operator brings this about: by XGROUP SETID or DELCONSUMER, or by
-- XACK. Those behind an entry that a consumer has are found once that is stored. What is given out twice by that is found stored. Atomic, since an entry that is given out or removed meanwhile is none of these.

local oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if not oldest then return 0 end
local id = oldest[1]
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
-- Without the group all are still to be given out.
if pending.err or #pending > 0 then return 0 end
for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  if group.name == ARGV[1] then
    local at, number = string.match(id, '(%d+)-(%d+)')
    local last_at, last_number = string.match(group['last-delivered-id'], '(%d+)-(%d+)')
    at, last_at = tonumber(at), tonumber(last_at)
    if at > last_at or (at == last_at and tonumber(number) > tonumber(last_number)) then return 0 end
    redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], '0')
    return 1
  end
end
return 0

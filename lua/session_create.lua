-- Starts a session of a user: kept to the user's maximum, for which the oldest go or the new one is refused.
--
-- KEYS    1 the user's sessions: a hash of `u`, the user's name, and of each session's record by what the session is called
-- ARGV    1 what the new session is called
--         2 the user's name
--         3 its idle timeout, and 4 its absolute timeout, in ms
--         5 its claims as JSON; empty: none
--         6 how many live sessions the user may have; 0: any number
--         7 1: the oldest go; 0: the new one is refused
--         8 the channel where ended sessions are told
--         9 how the message begins
-- reply   1, then what the sessions that had to go are called, oldest first; 0: the user has as many as allowed;
--         -1: the key belongs to a user of another name
--
-- A record is `CREATED ABSOLUTE SEEN IDLE CLAIMS`: ms since the Unix epoch by this server's clock, then the absolute timeout, the last
-- use that was written down and the idle timeout, in ms, the first two from CREATED on. The key lives as long as the last of its
-- sessions. All sessions of a user are one key, so that none has to be named that is not known ahead, and no index can be left over.
-- Atomic, since the maximum must hold whoever else creates.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local key, max = KEYS[1], tonumber(ARGV[6])
local life = math.min(tonumber(ARGV[3]), tonumber(ARGV[4]))

local user = redis.call('HGET', key, 'u')
if user and user ~= ARGV[2] then return { -1 } end

local function parse(record)
  local created, absolute, seen, idle = string.match(record, '^(%d+) (%d+) (%d+) (%d+)')
  created, absolute, idle = tonumber(created), math.min(absolute, ARGV[4]), math.min(idle, ARGV[3])
  return created, now >= created + absolute or now >= created + seen + idle
end

local reply, begins = { 1 }, now
if max > 0 then
  local all, live = redis.call('HGETALL', key), {}
  for i = 1, #all, 2 do
    if all[i] ~= 'u' then
      local created, expired = parse(all[i + 1])
      if expired then
        redis.call('HDEL', key, all[i])
      else
        live[#live + 1] = { created, all[i] }
        -- Each begins after those before it, so that there is an oldest.
        begins = math.max(begins, created + 1)
      end
    end
  end
  if #live >= max then
    if ARGV[7] == '0' then return { 0 } end
    table.sort(live, function(a, b) return a[1] < b[1] end)
    for i = 1, #live - max + 1 do
      redis.call('HDEL', key, live[i][2])
      reply[#reply + 1] = live[i][2]
    end
    redis.call('PUBLISH', ARGV[8], ARGV[9] .. ' ' .. table.concat(reply, ' ', 2))
  end
else
  -- Of many sessions a few are looked at, more than are added: expired ones stay a small part.
  local some = redis.call('HRANDFIELD', key, 4, 'WITHVALUES')
  for i = 1, #some, 2 do
    if some[i] ~= 'u' and select(2, parse(some[i + 1])) then redis.call('HDEL', key, some[i]) end
  end
end

local record = string.format('%.0f %s 0 %s', begins, ARGV[4], ARGV[3])
if ARGV[5] ~= '' then record = record .. ' ' .. ARGV[5] end
redis.call('HSET', key, 'u', ARGV[2], ARGV[1], record)
life = life + begins - now
if redis.call('PTTL', key) < life then redis.call('PEXPIRE', key, string.format('%.0f', life)) end
return reply

-- The slots of a concurrency limit for one key: a process says how many it holds and wants, and learns how many it may have.
--
-- KEYS    1 the slots: a hash of processes to `COUNT:TURN:UNTIL`, UNTIL in ms since the Unix epoch
-- ARGV    1 the process's name
--         2 its turn, which grows with each call: one that arrives late changes nothing
--         3 slots that its requests hold, which cannot be taken from it
--         4 slots that it would have, those among them
--         5 the limit
--         6 ms after which the slots of a process come back that has not called again
--         7 slots that it needs at least, for the first of the requests that ask: where there are fewer, it gets none. 0 where left out
-- reply   slots it has from now on, slots that others have
--
-- Atomic, since those of others must not change between counting and taking. A process that lives calls again in time. The turn of one
-- that has no slots is kept for LATE ms: a call from before that comes now would take slots of which it does not know.

local LATE = 2000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local process, turn = ARGV[1], tonumber(ARGV[2])
local held, want, limit, ttl = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

local others, mine, last = 0, 0, 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local count, at, to = string.match(all[i + 1], '^(%d+):(%d+):(%d+)$')
  if all[i] == process then
    mine, last = tonumber(count), tonumber(at)
  elseif tonumber(to) <= now then
    redis.call('HDEL', KEYS[1], all[i])
  else
    others = others + tonumber(count)
  end
end
if turn <= last then return { mine, others } end

local free = limit - others
local count = math.max(held, math.min(want, free))
-- A refused request takes nothing; what the process had before, requests may have taken while this call was on its way.
if count < tonumber(ARGV[7] or 0) then count = math.max(held, math.min(mine, free)) end
if count == 0 then ttl = math.min(ttl, LATE) end
redis.call('HSET', KEYS[1], process, string.format('%.0f:%.0f:%.0f', count, turn, now + ttl))
-- Others may hold theirs for longer.
if redis.call('PTTL', KEYS[1]) < ttl then redis.call('PEXPIRE', KEYS[1], ttl) end
return { count, others }

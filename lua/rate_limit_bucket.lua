-- Token buckets of one limit for one key: debits tokens of all its rules, or of none.
--
-- KEYS    one bucket a rule; all in one slot by their hash tag
-- ARGV    1 first: what the first of those who wait needs; less is a refusal (0: nobody waits)
--         2 need: for all who wait
--         3 want: with what is likely to be needed soon
--         4 share of what remains that may be taken beyond the need, 0 to 1
--         5 back: unspent tokens of an earlier call
--         6 when those were debited: µs since the Unix epoch, by this server's clock
--         then for each rule: µs that a token takes to come back, and the burst
-- reply   granted, now (µs since the Unix epoch), then for each rule: remaining, µs until the bucket is full,
--         µs until `first` can be granted, or where that was granted and less than `need`, one token more (0: now; -1: never), 0
--
-- A bucket is when it will be full (the theoretical arrival time of GCRA, ITU-T I.371 annex A): µs since 2025, which a double
-- holds to 1/64 µs for decades; and the µs of a token by which that was found, `FULL:INTERVAL`. Absent: full. At another rate, after
-- a reload or an override, as many tokens are used; what a larger burst left empties this bucket and no more: a client would else wait
-- for longer than it ever takes to fill. What is cut off so counts for larger bursts still, since processes with both may ask in turn,
-- as while a reload goes from one to the next: OVER, in µs, with CUT, the burst that cut it off. Each has 16 digits behind the
-- hundredths of FULL, where a script that knows nothing of them sees a number like any other.
-- No time that is told is above MOST, 285 years. Atomic, since all rules must be debited together. Rounded up, against the client.
--
-- A tenth of its time is saved by `+ 0`, which makes a number of a text as tonumber does without a call, and by tables that are made
-- with room for one rule.

local EPOCH, MOST, DAY = 1735689600, 9e15, 864e8
local time = redis.call('TIME')
local now = (time[1] - EPOCH) * 1000000 + time[2]
local first, need, want = ARGV[1] + 0, ARGV[2] + 0, ARGV[3] + 0
local share, back = ARGV[4] + 0, ARGV[5] + 0
local since_taken = now + EPOCH * 1000000 - ARGV[6]

local full, held, slack, changed, free = { 0 }, { 0 }, { 0 }, { false }, math.huge
local over, cut = { 0 }, { 0 }
for i = 1, #KEYS do
  local interval, burst = ARGV[5 + 2 * i] + 0, ARGV[6 + 2 * i] + 0
  local stored = redis.call('GET', KEYS[i])
  over[i], cut[i] = 0, math.huge
  if stored then
    local at, more, rate = string.match(stored, '^([^:.]*%.?%d?%d?)(%d*):(.*)$')
    held[i] = at + 0
    full[i] = held[i]
    if more ~= '' then over[i], cut[i] = string.sub(more, 1, 16) + 0, string.sub(more, 17) + 0 end
    if rate ~= ARGV[5 + 2 * i] and burst > 0 and full[i] + over[i] > now then
      full[i] = now + (full[i] - now) * interval / rate
      over[i] = over[i] * interval / rate
      changed[i] = true
    end
    if burst > cut[i] then full[i], over[i] = full[i] + over[i], 0 end
  else
    held[i], full[i] = now, now
  end
  -- What time has made good since cannot be given back as well.
  local owed = back * interval - math.max(0, since_taken)
  if back > 0 and owed > 0 then full[i] = full[i] - owed end
  if full[i] < now then full[i], over[i] = now, math.max(0, over[i] - (now - full[i])) end
  -- What rounding may have added to a backlog, by a hundred calls: it is to cost no token.
  slack[i] = math.min(1, interval / 100)
  -- Written down, or the bound would go along with the time. A burst of 0 says nothing of what was used.
  if burst > 0 and full[i] - now > burst * interval + slack[i] then
    over[i], cut[i] = over[i] + full[i] - now - burst * interval, burst
    full[i] = now + burst * interval
    changed[i] = true
  end
  free = math.min(free, burst - math.ceil((full[i] - now - slack[i]) / interval))
end

free = math.max(free, 0)
local granted = 0
if free >= first then
  granted = math.min(free, math.max(need, math.min(want, math.floor(free * share))))
end

-- Who waits behind the last tokens is to know when there are more.
local lacking = 0
if granted < need then lacking = granted == 0 and first > 1 and first or 1 end

local reply = { granted, now + EPOCH * 1000000 }
for i = 1, #KEYS do
  local interval, burst = ARGV[5 + 2 * i] + 0, ARGV[6 + 2 * i] + 0
  local backlog = full[i] - now
  if granted > 0 then
    backlog = backlog + math.ceil(granted * interval * 100) / 100
  end
  local wait = 0
  if lacking > burst then
    wait = -1
  elseif lacking > 0 then
    wait = math.max(0, math.ceil(backlog + (lacking - burst) * interval - slack[i]))
  end
  if burst > 0 and now + backlog ~= held[i] and (granted > 0 or back > 0 or changed[i]) then
    if over[i] > 0 then
      -- For longer it would be kept for those with larger bursts alone.
      local lives = backlog + math.min(over[i], DAY)
      local more = string.format('%016.0f%016.0f', math.min(MOST, math.ceil(over[i])), cut[i])
      redis.call('SET', KEYS[i], string.format('%.2f%s:%s', now + backlog, more, ARGV[5 + 2 * i]), 'PX', math.min(MOST, math.ceil(lives / 1000) + 1))
    elseif backlog > 0 then
      redis.call('SET', KEYS[i], string.format('%.2f:%s', now + backlog, ARGV[5 + 2 * i]), 'PX', math.min(MOST, math.ceil(backlog / 1000) + 1))
    else
      redis.call('DEL', KEYS[i])
    end
  end
  reply[#reply + 1] = math.max(0, burst - math.ceil((backlog - slack[i]) / interval))
  reply[#reply + 1] = math.min(MOST, math.ceil(backlog - math.min(backlog, 0.01)))
  reply[#reply + 1] = math.min(MOST, wait)
  reply[#reply + 1] = 0
end
return reply

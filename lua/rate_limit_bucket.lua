-- Token buckets of one limit for one key: debits tokens of all its rules, or of none. So for each of several keys, one behind the other,
-- which do not have to do with each other: rate_limit_each.lua is the end of this script.
--
-- KEYS    one bucket a rule; those of one key of a limit in one slot by their hash tag
-- ARGV    one for each key of a limit: doubles, one behind the other, each of 8 bytes, little-endian:
--           first: what the first of those who wait needs; less is a refusal (0: nobody waits)
--           need: for all who wait
--           want: with what is likely to be needed soon
--           share of what remains that may be taken beyond the need, 0 to 1
--           back: unspent tokens of an earlier call
--           taken_at: when those were debited, µs since the Unix epoch, by this server's clock
--           then for each rule: µs that a token takes to come back, and the burst
-- reply   for each of ARGV an array of one text, why its keys cannot be read or written (WRONGTYPE, OOM); or such doubles: granted, now (µs since the Unix epoch), then for each rule: remaining, µs until the bucket is full,
--         µs until `first` can be granted, or where that was granted and less than `need`, one token more (0: now; -1: never), 0
--
-- A bucket is two such doubles: when it will be full (the theoretical arrival time of GCRA, ITU-T I.371 annex A), in µs since 2025, of
-- which a double holds 1/64 until 2029, 1/16 until 2042; and the µs of a token by which that was found. Absent: full. At another rate, after
-- a reload or an override, as many tokens are used; what a larger burst left empties this bucket and no more: a client would else wait
-- for longer than it ever takes to fill. What is cut off so counts for larger bursts still, since processes with both may ask in turn,
-- as while a reload goes from one to the next: it is two more doubles, the µs that were cut off, and the burst that did.
-- No time that is told is above MOST, 285 years. Atomic, since all rules must be debited together. Rounded up, against the client.
--
-- Doubles, since numbers as texts, each an argument or a reply of its own, took a quarter of the time.

local EPOCH, MOST, DAY = 1735689600, 9e15, 864e8
local time = redis.call('TIME')
local now = (time[1] - EPOCH) * 1000000 + time[2]
local call, pack, unpack, max, min, ceil = redis.call, struct.pack, struct.unpack, math.max, math.min, math.ceil

-- Bytes of ARGV for each rule.
local OF_RULE = 16

-- What is asked of the rules whose keys stand behind so many others.
local function grant(asked, rules, behind)
  local first, need, want, share, back, taken_at = unpack('<dddddd', asked)
  local since_taken = now + EPOCH * 1000000 - taken_at

  local full, held, slack, changed, free = { 0 }, { 0 }, { 0 }, { false }, math.huge
  local over, cut = { 0 }, { 0 }
  for i = 1, rules do
    local interval, burst = unpack('<dd', asked, 33 + 16 * i)
    local stored = call('GET', KEYS[behind + i])
    over[i], cut[i] = 0, math.huge
    if stored then
      local rate
      held[i], rate = unpack('<dd', stored)
      full[i] = held[i]
      if #stored > 16 then over[i], cut[i] = unpack('<dd', stored, 17) end
      if rate ~= interval and burst > 0 and full[i] + over[i] > now then
        full[i] = now + (full[i] - now) * interval / rate
        over[i] = over[i] * interval / rate
        changed[i] = true
      end
      if burst > cut[i] then full[i], over[i] = full[i] + over[i], 0 end
    else
      held[i], full[i] = now, now
    end
    -- What time has made good since cannot be given back as well.
    local owed = back * interval - max(0, since_taken)
    if back > 0 and owed > 0 then full[i] = full[i] - owed end
    if full[i] < now then full[i], over[i] = now, max(0, over[i] - (now - full[i])) end
    -- What rounding may have added to a backlog, by a hundred calls: it is to cost no token.
    slack[i] = min(1, interval / 100)
    -- Written down, or the bound would go along with the time. A burst of 0 says nothing of what was used.
    if burst > 0 and full[i] - now > burst * interval + slack[i] then
      over[i], cut[i] = over[i] + full[i] - now - burst * interval, burst
      full[i] = now + burst * interval
      changed[i] = true
    end
    free = min(free, burst - ceil((full[i] - now - slack[i]) / interval))
  end

  free = max(free, 0)
  local granted = 0
  if free >= first then
    granted = min(free, max(need, min(want, math.floor(free * share))))
  end

  -- Who waits behind the last tokens is to know when there are more.
  local lacking = 0
  if granted < need then lacking = granted == 0 and first > 1 and first or 1 end

  local reply = pack('<dd', granted, now + EPOCH * 1000000)
  for i = 1, rules do
    local interval, burst = unpack('<dd', asked, 33 + 16 * i)
    local backlog = full[i] - now
    if granted > 0 then
      backlog = backlog + ceil(granted * interval * 100) / 100
    end
    local wait = 0
    if lacking > burst then
      wait = -1
    elseif lacking > 0 then
      wait = max(0, ceil(backlog + (lacking - burst) * interval - slack[i]))
    end
    if burst > 0 and now + backlog ~= held[i] and (granted > 0 or back > 0 or changed[i]) then
      if over[i] > 0 then
        -- For longer it would be kept for those with larger bursts alone.
        local lives = backlog + min(over[i], DAY)
        local value = pack('<dddd', now + backlog, interval, min(MOST, over[i]), cut[i])
        call('SET', KEYS[behind + i], value, 'PX', min(MOST, ceil(lives / 1000) + 1))
      elseif backlog > 0 then
        call('SET', KEYS[behind + i], pack('<dd', now + backlog, interval), 'PX', min(MOST, ceil(backlog / 1000) + 1))
      else
        call('DEL', KEYS[behind + i])
      end
    end
    local remaining = max(0, burst - ceil((backlog - slack[i]) / interval))
    local reset = min(MOST, ceil(backlog - min(backlog, 0.01)))
    reply = reply .. pack('<dddd', remaining, reset, min(MOST, wait), 0)
  end
  return reply
end

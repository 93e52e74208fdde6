-- A process reports what it saw of a shared circuit breaker, and learns the state. Makes every transition but forced ones.
--
-- KEYS    1 the state: a hash  g generation · s state · e when an opening or a ramp ends (ms since the Unix epoch)
--                              (of half-open: when it began) · n ms of the next opening · k failures in a row
--                              r probes that ended: PROCESS:WELL:BADLY of each process, with blanks between
--                              p the last probe's number · d when slots were last wanted in vain · w number of the window
--         2 the window: its number, then STEP:CALLS:FAILURES:SLOW for each part of it, oldest first
--         3 the processes that share it: a sorted set by when they were last heard
--         4 those that doubt the upstream: likewise; with `?` behind it, one that does for a single call
--         5 the probes' slots that are given: a sorted set of PROCESS/NUMBER by when they come back
-- ARGV    1 process: who reports
--         2 known, 3 known_state, 4 known_left: generation, state and ms left of it that the process knows
--         5 calls, 6 failures, 7 slow: results since its last report
--         8 succeeded: 1 where one did
--         9 trailing: failures after that
--         10 doubts: failures or slow calls for which the process doubts the upstream; 0: it does not
--         11 want: slots that it wants
--         12 demanded: 1 where requests ask for them
--         13 held: slots that it holds, `N,N…`
--         14 results: probes that ended, `N+` or `N-`
--         15 kind: `t` or `c`, a window of time or of calls
--         16 size: its ms or its calls
--         17 minimum_calls, 18 failure_rate, 19 consecutive_failures: settings
--         20 slow_rate: of slow_call; -1: none
--         21 quorum, 22 open_for (ms), 23 max_open_for (ms): settings
--         24 jitter: what it adds to an opening, as a share
--         25 probes, 26 success_rate: settings of half_open
--         27 slot_lasts: ms for which a slot is given
--         28 recover_over: a setting (ms)
--         29 heard_slot: the last one that the process has heard of; it cannot hold later ones yet
--         30 channel: that of transitions
--         31 tag: the breaker's
--         32 max_jitter: the most that jitter adds, as a share
--         33 peers: processes that the process takes for alive. Who was away itself, or lost its data, has heard fewer
-- reply   generation, state, ms left, calls, failures, slow, processes, processes that doubt, 1 where held slots are wanted,
--         1 where fewer slots are given than asked for, the last slot given to whomever, then the slots given
--
-- All keys of a breaker have one hash tag. Atomic, so that of all reports one makes a transition, and what is counted and given
-- is of one generation. A fleet that knows a later generation than Redis, which lost it in a failover, puts it back.

local DAY, DEAD_AFTER, DOUBT_FOR, WANTED_FOR, OTHERS_WITHIN = 86400000, 5000, 3000, 1000, 3000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local process = ARGV[1]
local known, known_state, known_left = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local calls, failures, slow = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local succeeded, trailing, doubts = ARGV[8] == '1', tonumber(ARGV[9]), tonumber(ARGV[10])
local want, demanded, held, results = tonumber(ARGV[11]), ARGV[12] == '1', ARGV[13], ARGV[14]
local kind, size, minimum_calls = ARGV[15], tonumber(ARGV[16]), tonumber(ARGV[17])
local failure_rate, consecutive_failures, slow_rate = tonumber(ARGV[18]), tonumber(ARGV[19]), tonumber(ARGV[20])
local quorum, open_for, max_open_for, jitter = tonumber(ARGV[21]), tonumber(ARGV[22]), tonumber(ARGV[23]), tonumber(ARGV[24])
local probes, success_rate, slot_lasts, recover_over = tonumber(ARGV[25]), tonumber(ARGV[26]), tonumber(ARGV[27]), tonumber(ARGV[28])
local heard_slot, channel, tag, max_jitter = tonumber(ARGV[29]), ARGV[30], ARGV[31], tonumber(ARGV[32])
local peers = tonumber(ARGV[33])

local field = redis.call('HMGET', KEYS[1], 'g', 's', 'e', 'n', 'k', 'r', 'p', 'd', 'w')
local generation, state = tonumber(field[1] or 0), field[2] or 'closed'
local ends, next_open_for = tonumber(field[3] or 0), tonumber(field[4] or open_for)
local row, ended = tonumber(field[5] or 0), field[6] or ''
local last, wanted, window = tonumber(field[7] or 0), math.min(tonumber(field[8] or 0), now), tonumber(field[9] or 0)
local changed, dirty = false, false

local function go(to, lasts)
  if to ~= 'open' and not (state == 'recovering' and to == 'closed') then
    window, row = window + 1, 0
  end
  generation, state, ends = generation + 1, to, now + lasts
  ended, wanted = '', 0
  if to ~= 'closed' then redis.call('DEL', KEYS[4]) end
  redis.call('DEL', KEYS[5])
  changed = true
end
local function open()
  local lasts = next_open_for * (1 + jitter)
  next_open_for = math.min(next_open_for * 2, max_open_for)
  go('open', math.ceil(lasts))
end
local function reaches(part, whole, rate)
  return part > 0 and part / whole >= rate
end

if known > generation then
  window, row, ended, wanted = window + 1, 0, '', 0
  generation, state, ends = known, known_state, now + known_left
  if state == 'open' then next_open_for = math.min(open_for * 2, max_open_for) end
  redis.call('DEL', KEYS[4], KEYS[5])
  dirty = true
end
-- Settings of a reload hold for the next opening, as they do where a breaker is local.
if state == 'closed' then next_open_for = open_for end
next_open_for = math.max(open_for, math.min(next_open_for, max_open_for))
-- A clock that was set back must not make any last longer than it could.
local longest = recover_over
if state == 'half_open' then longest = 0 end
if state == 'open' then longest = math.ceil(max_open_for * (1 + max_jitter)) end
if (state == 'open' or state == 'half_open' or state == 'recovering') and ends > now + longest then
  ends, dirty = now + longest, true
end
if state == 'open' and now >= ends then
  go('half_open', 0)
elseif state == 'recovering' and now >= ends then
  go('closed', 0)
  next_open_for = open_for
end
local counts = known == generation

redis.call('ZADD', KEYS[3], now, process)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - DEAD_AFTER)
-- From before a clock was set back. By less, those who live are to stay.
redis.call('ZREMRANGEBYSCORE', KEYS[3], now + DEAD_AFTER, '+inf')
redis.call('PEXPIRE', KEYS[3], DEAD_AFTER)
local processes = redis.call('ZCARD', KEYS[3])
local alive = math.max(processes, peers)
redis.call('ZREM', KEYS[4], process, process .. '?')
if doubts > 0 and counts then
  redis.call('ZADD', KEYS[4], now, doubts > 1 and process or process .. '?')
  redis.call('PEXPIRE', KEYS[4], DOUBT_FOR)
end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - DOUBT_FOR)
redis.call('ZREMRANGEBYSCORE', KEYS[4], now + DOUBT_FOR, '+inf')
local members = redis.call('ZRANGE', KEYS[4], 0, -1)
local doubters = #members
-- A single failure is chance, unless all that live have one.
if quorum > 1 and doubters < alive then
  for i = 1, #members do
    if string.sub(members[i], -1) == '?' then doubters = doubters - 1 end
  end
end

-- The window, in steps: tenths of its time, or about twentieths of its calls.
local parts, all, all_failures, all_slow = {}, 0, 0, 0
local text = redis.call('GET', KEYS[2])
local number, rest = string.match(text or '', '^(%d+) (.*)$')
local width, step = 0, 0
if kind == 't' then
  width = math.max(size / 10, 1)
  step = math.floor(now / width)
end
if number and tonumber(number) == window then
  for s, c, f, w in string.gmatch(rest, '(%d+):(%d+):(%d+):(%d+)') do
    s = tonumber(s)
    if width == 0 or s > step - 10 and s <= step + 1 then
      parts[#parts + 1] = { s, tonumber(c), tonumber(f), tonumber(w) }
    end
  end
end
if counts and calls > 0 then
  local newest = parts[#parts]
  local fits = newest and (width > 0 and newest[1] >= step or width == 0 and newest[2] + calls <= size / 20)
  if not fits then
    newest = { step, 0, 0, 0 }
    parts[#parts + 1] = newest
  end
  newest[2], newest[3], newest[4] = newest[2] + calls, newest[3] + failures, newest[4] + slow
  if succeeded then row = trailing else row = row + failures end
  dirty = dirty or consecutive_failures > 0
end
for i = 1, #parts do
  all, all_failures, all_slow = all + parts[i][2], all_failures + parts[i][3], all_slow + parts[i][4]
end
local first = 1
while width == 0 and first < #parts and all - parts[first][2] >= size do
  local gone = parts[first]
  all, all_failures, all_slow = all - gone[2], all_failures - gone[3], all_slow - gone[4]
  first = first + 1
end
if counts and calls > 0 then
  local texts = {}
  for i = first, #parts do
    local part = parts[i]
    texts[#texts + 1] = string.format('%.0f:%.0f:%.0f:%.0f', part[1], part[2], part[3], part[4])
  end
  local lives = DAY
  if width > 0 then lives = math.ceil(size + width) end
  redis.call('SET', KEYS[2], string.format('%.0f ', window) .. table.concat(texts, ','), 'PX', lives)
end

if counts and (state == 'closed' or state == 'recovering') and (calls > 0 or doubts > 0) then
  local trips = consecutive_failures > 0 and row >= consecutive_failures
    or all >= minimum_calls
      and (reaches(all_failures, all, failure_rate) or slow_rate >= 0 and reaches(all_slow, all, slow_rate))
  if trips and doubters >= math.min(quorum, alive) then open() end
end

local given, recall, starved = {}, 0, 0
if state == 'half_open' then
  redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now)
  -- From before a clock was set back; who lives says so again.
  for _, slot in ipairs(redis.call('ZRANGEBYSCORE', KEYS[5], '(' .. now + slot_lasts, '+inf')) do
    redis.call('ZADD', KEYS[5], now + slot_lasts, slot)
  end
  local mine, holds = 0, {}
  local my_good, my_bad = 0, 0
  if counts then
    for id, mark in string.gmatch(results, '(%d+)([+-])') do
      if redis.call('ZREM', KEYS[5], process .. '/' .. id) == 1 then
        if mark == '+' then my_good = my_good + 1 else my_bad = my_bad + 1 end
        dirty = true
      end
    end
    for id in string.gmatch(held, '%d+') do holds[process .. '/' .. id] = true end
  end
  local slots = redis.call('ZRANGE', KEYS[5], 0, -1)
  for i = 1, #slots do
    if holds[slots[i]] then
      redis.call('ZADD', KEYS[5], now + slot_lasts, slots[i])
      mine = mine + 1
    elseif string.sub(slots[i], 1, #process + 1) == process .. '/' then
      -- A report that was long on the way does not know what was given since, nor does one of a process that heard no answer.
      if counts and tonumber(string.sub(slots[i], #process + 2)) <= heard_slot then
        redis.call('ZREM', KEYS[5], slots[i])
      else
        mine = mine + 1
      end
    end
  end
  -- Of those that have failed none, and of all.
  local well, good, bad, sick, of_each = 0, 0, 0, 0, {}
  local function count(name, goods, bads)
    good, bad = good + goods, bad + bads
    if bads > 0 then sick = sick + 1 else well = well + goods end
    if goods + bads > 0 then of_each[#of_each + 1] = string.format('%s:%.0f:%.0f', name, goods, bads) end
  end
  for name, goods, bads in string.gmatch(ended, '(%S+):(%d+):(%d+)') do
    if name == process then
      my_good, my_bad = my_good + goods, my_bad + bads
    else
      count(name, tonumber(goods), tonumber(bads))
    end
  end
  count(process, my_good, my_bad)
  ended = table.concat(of_each, ' ')
  -- Fewer than open a closed one do not open this again, while others can still say how it is.
  local doubted = sick >= math.min(quorum, alive)
  local waits = not doubted and now < ends + OTHERS_WITHIN
  -- Decided as soon as the probes still to come cannot change it.
  local passes = reaches(good, probes, success_rate)
  local too_many = not reaches(math.max(probes - bad, 0), probes, success_rate)
  local fails = too_many and not (waits and good + bad < probes)
  if fails and not doubted and well > 0 then passes = true end
  if passes then
    go('recovering', recover_over)
    if recover_over == 0 then
      go('closed', 0)
      next_open_for = open_for
    end
  elseif fails then
    open()
  else
    local free = math.max(probes - good - bad - redis.call('ZCARD', KEYS[5]), 0)
    -- None takes all: that several processes see the upstream well says more than that one does.
    local share = math.max(1, math.ceil(probes / alive))
    -- Who has failed leaves the rest to the others.
    if too_many and my_bad > 0 then share = 0 end
    local asked = math.min(want, math.max(share - mine, 0))
    local grant = math.min(asked, free)
    if demanded then
      if grant < asked then wanted, dirty = now, true end
      if grant < want then starved = 1 end
    elseif now - wanted <= WANTED_FOR then
      grant = 0
    end
    for _ = 1, grant do
      last = last + 1
      redis.call('ZADD', KEYS[5], now + slot_lasts, string.format('%s/%.0f', process, last))
      given[#given + 1] = last
      dirty = true
    end
    if free == 0 and wanted < now and now - wanted <= WANTED_FOR then recall = 1 end
  end
  redis.call('PEXPIRE', KEYS[5], slot_lasts + DAY)
end

local left = 0
if state == 'open' or state == 'recovering' then left = math.max(0, ends - now) end
if changed or dirty then
  local whole = function(value) return string.format('%.0f', value) end
  redis.call('HSET', KEYS[1], 'g', whole(generation), 's', state, 'e', whole(ends), 'n', whole(next_open_for),
    'k', whole(row), 'r', ended, 'p', whole(last), 'd', whole(wanted), 'w', whole(window))
end
-- A forced state outlives a fleet that is away for a while.
local lives = DAY + left
if string.sub(state, 1, 6) == 'forced' then lives = 30 * DAY end
redis.call('PEXPIRE', KEYS[1], lives)
if changed then
  redis.call('PUBLISH', channel, string.format('%s %.0f %s %.0f', tag, generation, state, left))
  if window ~= tonumber(field[9] or 0) then all, all_failures, all_slow = 0, 0, 0 end
end
local reply = { generation, state, left, all, all_failures, all_slow, processes, doubters, recall, starved, last }
for i = 1, #given do reply[#reply + 1] = given[i] end
return reply

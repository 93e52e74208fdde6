//! `traceparent` and `tracestate` (W3C Trace Context, level 1): what is valid, and how it is written. What is not valid is not
//! there.

/// What `traceparent` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// Not zero.
    pub trace_id: [u8; 16],
    /// The caller's span; not zero.
    pub parent_id: [u8; 8],
    /// Whether the caller may have recorded it.
    pub sampled: bool,
}

/// The length of version 00.
pub const LENGTH: usize = 55;

const SAMPLED: u8 = 1;

impl TraceParent {
    /// Reads a value (section 3.2). Later versions begin as 00 does (section 4.3); of their flags only `sampled` is known.
    pub fn parse(value: &[u8]) -> Option<TraceParent> {
        let (known, rest) = value.split_at_checked(LENGTH)?;
        if [known[2], known[35], known[52]] != *b"---" {
            return None;
        }
        let [version] = hex(&known[..2])?;
        let goes_on = match version {
            0 => rest.is_empty(),
            255 => false,
            _ => matches!(rest.first(), None | Some(b'-')),
        };
        let (trace_id, parent_id) = (hex(&known[3..35])?, hex(&known[36..52])?);
        let [flags] = hex(&known[53..])?;
        let is_valid = goes_on && trace_id != [0; 16] && parent_id != [0; 8];
        is_valid.then_some(TraceParent {
            trace_id,
            parent_id,
            sampled: flags & SAMPLED != 0,
        })
    }

    /// The value, in version 00.
    pub fn value(&self) -> [u8; LENGTH] {
        let mut value = *b"00-00000000000000000000000000000000-0000000000000000-00";
        put_hex(&mut value[3..35], &self.trace_id);
        put_hex(&mut value[36..52], &self.parent_id);
        value[54] += u8::from(self.sampled);
        value
    }
}

/// Whether the values of all `tracestate` fields of a head are one valid list (section 3.3.1).
pub fn is_tracestate<'a>(values: impl Iterator<Item = &'a [u8]>) -> bool {
    const MOST: usize = 32;
    let mut keys: Vec<&[u8]> = Vec::new();
    let members = values.flat_map(|value| value.split(|byte| *byte == b','));
    for member in members {
        let member = member.trim_ascii();
        if member.is_empty() {
            continue;
        }
        let Some(at) = member.iter().position(|byte| *byte == b'=') else {
            return false;
        };
        let (key, value) = (&member[..at], &member[at + 1..]);
        if !is_key(key) || !is_value(value) || keys.contains(&key) || keys.len() == MOST {
            return false;
        }
        keys.push(key);
    }
    true
}

/// `vendor`, or `tenant@vendor`.
fn is_key(key: &[u8]) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase();
    let goes_on = |rest: &[u8]| {
        rest.iter()
            .all(|byte| is_letter(*byte) || byte.is_ascii_digit() || b"_-*/".contains(byte))
    };
    let part = |part: &[u8], most: usize, begins: &dyn Fn(u8) -> bool| {
        part.split_first()
            .is_some_and(|(first, rest)| begins(*first) && goes_on(rest) && part.len() <= most)
    };
    match key.iter().position(|byte| *byte == b'@') {
        None => part(key, 256, &is_letter),
        Some(at) => {
            let begins = |byte: u8| is_letter(byte) || byte.is_ascii_digit();
            part(&key[..at], 241, &begins) && part(&key[at + 1..], 14, &is_letter)
        }
    }
}

fn is_value(value: &[u8]) -> bool {
    let may_be = |byte: &u8| matches!(byte, b' '..=b'~') && !b",=".contains(byte);
    !value.is_empty() && value.len() <= 256 && value.iter().all(may_be) && !value.ends_with(b" ")
}

/// Lower case alone, as sections 3.2.2.3 and 3.2.2.4 want it.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

fn put_hex(out: &mut [u8], bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (pair, byte) in out.chunks_exact_mut(2).zip(bytes) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "0af7651916cd43dd8448eb211c80319c";
    const PARENT: &str = "b7ad6b7169203331";

    #[test]
    fn a_traceparent_is_taken_whole_or_not_at_all() {
        let check = |value: &str, sampled: Option<bool>| {
            let parsed = TraceParent::parse(value.as_bytes());
            assert_eq!(parsed.map(|parent| parent.sampled), sampled, "{value}");
        };
        check(&format!("00-{ID}-{PARENT}-01"), Some(true));
        check(&format!("00-{ID}-{PARENT}-00"), Some(false));
        // Flags that this level does not know.
        check(&format!("00-{ID}-{PARENT}-fe"), Some(false));
        check(&format!("00-{ID}-{PARENT}-ff"), Some(true));
        check(&format!("cc-{ID}-{PARENT}-01"), Some(true));
        check(&format!("cc-{ID}-{PARENT}-01-what-comes"), Some(true));
        check(&format!("cc-{ID}-{PARENT}-01what-comes"), None);
        check(&format!("cc-{ID}-{PARENT}-01.what"), None);
        check(&format!("00-{ID}-{PARENT}-01-what"), None);
        check(&format!("ff-{ID}-{PARENT}-01"), None);
        check(&format!("0-{ID}-{PARENT}-01"), None);
        check(&format!("00-{}-{PARENT}-01", &ID[1..]), None);
        check(&format!("00-+{}-{PARENT}-01", &ID[1..]), None);
        check(&format!("00-{}-{PARENT}-01", ID.to_uppercase()), None);
        check(&format!("00-{ID}-{}-01", PARENT.to_uppercase()), None);
        check(&format!("0A-{ID}-{PARENT}-01"), None);
        check(&format!("00-{ID}-{PARENT}-0A"), None);
        check(&format!("00-{}-{PARENT}-01", "0".repeat(32)), None);
        check(&format!("00-{ID}-{}-01", "0".repeat(16)), None);
        check(&format!("00-{ID}-{PARENT}-0"), None);
        check(&format!("00-{ID}-{PARENT}"), None);
        check(&format!("00_{ID}-{PARENT}-01"), None);
        check("", None);
    }

    #[test]
    fn a_tracestate_is_a_list_of_known_form() {
        let check = |values: &[&str], valid: bool| {
            let got = is_tracestate(values.iter().map(|value| value.as_bytes()));
            assert_eq!(got, valid, "{values:?}");
        };
        check(&["a=1"], true);
        check(&["a=1,b=2 c", " t-1_*/x=! , ,", ""], true);
        check(&["1tenant@vendor=x"], true);
        check(&["1tenant=x"], false);
        check(&["tenant@1vendor=x"], false);
        check(&["a@b@c=x"], false);
        check(&["A=1"], false);
        check(&["a"], false);
        check(&["a="], false);
        check(&["=1"], false);
        check(&["a=1=2"], false);
        check(&["a=1\t2"], false);
        check(&["a=\u{e9}"], false);
        check(&["a=1", "a=2"], false);
        check(&[&format!("{}=1", "a".repeat(256))], true);
        check(&[&format!("{}=1", "a".repeat(257))], false);
        check(&[&format!("a={}", "1".repeat(256))], true);
        check(&[&format!("a={}", "1".repeat(257))], false);
        let many = |count: usize| {
            let members = (0..count).map(|n| format!("k{n}=1"));
            members.collect::<Vec<_>>().join(",")
        };
        check(&[&many(32)], true);
        check(&[&many(33)], false);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(trace_id: [u8; 16], parent_id: [u8; 8], sampled: bool) {
            prop_assume!(trace_id != [0; 16] && parent_id != [0; 8]);
            let parent = TraceParent { trace_id, parent_id, sampled };
            prop_assert_eq!(TraceParent::parse(&parent.value()), Some(parent));
        }

        #[test]
        fn what_is_read_is_what_stands_there(value in "[0-9a-fA-F-]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-fA-F]{2}(-.{0,4})?") {
            if let Some(parent) = TraceParent::parse(value.as_bytes()) {
                let written = parent.value();
                prop_assert_eq!(&written[3..53], &value.as_bytes()[3..53]);
            }
        }

        #[test]
        fn no_bytes_panic(value in prop::collection::vec(any::<u8>(), 0..70)) {
            let _ = TraceParent::parse(&value);
            let _ = is_tracestate([&value[..]].into_iter());
        }
    }
}

//! Values of the file by themselves: numbers within bounds, times, addresses, names, secrets. Must not know which key one is of.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;

use super::{Checker, DAY};
use crate::config::Secret;
use crate::config::units::{ByteSize, Percent, TimeLength};
use crate::config::yaml::{At, Position, told};
use crate::event::REDACTED;

pub(super) const MASKED: &str =
    "a masked secret, as weir check --print shows it: put the real one here";

impl Checker {
    /// Whether the file itself has the value, which no variable or file brought in.
    pub(super) fn is_spelt<T>(&self, at: &At<T>) -> bool {
        !self.brought_in.has(&at.place)
    }

    pub(super) fn networks(&mut self, list: Vec<At<String>>) -> Vec<IpNet> {
        self.each(list, |text| {
            let alone = || text.parse::<IpAddr>().map(IpNet::from);
            text.parse::<IpNet>()
                .or_else(|_| alone())
                .map_err(|_| format!("\"{text}\" is not a network: use an address or a prefix, for example 10.0.0.0/8"))
        })
    }

    /// Port 0 where it is none.
    pub(super) fn address(&mut self, at: At<String>) -> SocketAddr {
        let address = self.read(at, |text| {
            text.parse()
                .map_err(|_| format!("\"{text}\" is not an address: {}", address_meant(text)))
        });
        address.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)))
    }

    /// A length of time from 1 ms to `most`.
    pub(super) fn time_within(
        &mut self,
        at: Option<At<TimeLength>>,
        default: Duration,
        most: Duration,
    ) -> Duration {
        let Some((span, place)) = at.and_then(At::told) else {
            return default;
        };
        if span.0.is_zero() || span.0 > most {
            let message = format!(
                "{span} is out of bounds: use 1ms to {}, for example {}",
                TimeLength(most),
                TimeLength(default)
            );
            self.refuse(&place, message);
        }
        span.0
    }

    /// A timeout, of which 0 would end all that it is for at once; in Envoy it is none.
    pub(super) fn timeout(&mut self, at: Option<At<TimeLength>>, default: Duration) -> Duration {
        let Some((TimeLength(told), place)) = at.and_then(At::told) else {
            return default;
        };
        if told.is_zero() {
            let message = format!(
                "0s is over at once, and stands for no \"never\": use 1ms or more, for example {}, or 1d where it is not to matter",
                TimeLength(default)
            );
            self.refuse(&place, message);
        }
        told
    }

    /// Whole days, one at least.
    pub(super) fn days(&mut self, at: Option<At<TimeLength>>, default: Duration) -> Duration {
        let Some((span, place)) = at.and_then(At::told) else {
            return default;
        };
        if span.0 < DAY || !span.0.as_secs().is_multiple_of(DAY.as_secs()) {
            let message = format!(
                "\"{span}\" is not a number of days: use 1d or more, for example 400d, or leave out \"audit\" to keep nothing"
            );
            self.refuse(&place, message);
        }
        span.0
    }

    /// A number within `bounds`, of which the upper may be none.
    pub(super) fn count_within<T: Into<u64>, N: TryFrom<u64> + Default>(
        &mut self,
        at: Option<At<T>>,
        default: u64,
        bounds: RangeInclusive<u64>,
    ) -> N {
        let told = at.and_then(At::told);
        let (count, place) = told.map_or((default, Position::default()), |(count, at)| {
            (count.into(), at)
        });
        if !bounds.contains(&count) {
            let (least, most) = bounds.into_inner();
            let message = match most {
                u64::MAX => {
                    format!("{count} is too little: use {least} or more, for example {default}")
                }
                most => format!(
                    "{count} is out of bounds: use {least} to {most}, for example {default}"
                ),
            };
            self.refuse(&place, message);
        }
        // One that does not fit is out of bounds.
        N::try_from(count).unwrap_or_default()
    }

    pub(super) fn read<T>(
        &mut self,
        at: At<String>,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = at.value?;
        read(&text)
            .map_err(|message| self.refuse(&at.place, message))
            .ok()
    }

    /// What is right of a list.
    pub(super) fn each<T>(
        &mut self,
        list: Vec<At<String>>,
        mut read: impl FnMut(&str) -> Result<T, String>,
    ) -> Vec<T> {
        let list = list.into_iter();
        list.filter_map(|at| self.read(at, &mut read)).collect()
    }

    /// Bytes that a request may have of something; in nginx 0 is no limit.
    pub(super) fn room(&mut self, at: Option<At<ByteSize>>, default: u64) -> u64 {
        let Some((ByteSize(bytes), place)) = at.and_then(At::told) else {
            return default;
        };
        if bytes == 0 {
            let message = format!(
                "0B has room for nothing, and stands for no \"unlimited\": use, for example, {}, or 1024GiB where it is not to matter",
                ByteSize(default)
            );
            self.refuse(&place, message);
        }
        bytes
    }

    /// The value of a field that is shown as a mask where it may be secret; a mask is none.
    pub(super) fn shown_value(
        &mut self,
        name: &str,
        at: At<String>,
        read: impl FnOnce(&str) -> Result<String, String>,
    ) -> Option<String> {
        if !self.is_spelt(&at) {
            self.hidden.insert(name.to_ascii_lowercase());
        }
        self.read(at, |text| match is_mask(text) {
            true => Err(MASKED.to_owned()),
            false => read(text),
        })
    }
}

/// The mend of what is no `IP:PORT`.
fn address_meant(text: &str) -> String {
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let is_port = port.parse::<u16>().is_ok();
    match host {
        // A port alone is one in Go and nginx.
        "" | "*" if is_port => format!("use IP:PORT, for example 0.0.0.0:{port}"),
        "localhost" if is_port => format!("use IP:PORT, for example 127.0.0.1:{port}"),
        host if is_port && host.parse::<Ipv6Addr>().is_ok() => {
            format!("an IPv6 address stands in [], as in \"[{host}]:{port}\"")
        }
        _ => "use IP:PORT, for example 0.0.0.0:8080".to_owned(),
    }
}

pub(super) fn time(at: Option<At<TimeLength>>, default: Duration) -> Duration {
    told(at).map_or(default, |TimeLength(span)| span)
}

pub(super) fn share(at: Option<At<Percent>>, default: f64) -> f64 {
    told(at).map_or(default, |Percent(share)| share)
}

/// What stands in place of a secret where the configuration is shown: taken for one, whoever has read it could guess it.
pub(super) fn is_mask(text: &str) -> bool {
    text == REDACTED
}

/// `spelt`: whether the file itself has the text, which no variable or file brought in.
pub(super) fn secret(text: &str, spelt: bool) -> Result<Secret, String> {
    if is_mask(text) {
        return Err(MASKED.to_owned());
    }
    // As shells and Kubernetes spell a variable. Taken for the secret itself, anyone could guess it.
    let name = text.strip_prefix('$').map(|rest| {
        let inner = rest
            .strip_prefix('(')
            .and_then(|rest| rest.strip_suffix(')'));
        inner.unwrap_or(rest)
    });
    let is_name = |name: &str| {
        !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    match name.filter(|name| spelt && is_name(name)) {
        Some(name) => Err(format!(
            "stands for itself here, not for a variable: write ${{{name}}}"
        )),
        None => Ok(Secret(text.to_owned())),
    }
}

/// A prefix stands before a hash tag, and a key is one word of a command line.
pub(super) fn key_prefix(text: &str) -> Result<String, String> {
    let is_bad = |c: char| matches!(c, '{' | '}') || c.is_whitespace() || c.is_control();
    if text.is_empty() {
        return Err("an empty prefix marks nothing: use, for example, weir".to_owned());
    }
    match text.contains(is_bad) {
        true => Err(
            "a prefix has no braces, which name a slot, white space or control characters: use, for example, weir"
                .to_owned(),
        ),
        false => Ok(text.to_owned()),
    }
}

pub(super) fn not_empty(text: &str) -> Result<String, String> {
    match text {
        "" => Err("an empty one says nothing: set one, or leave the key out".to_owned()),
        text => Ok(text.to_owned()),
    }
}

/// A field name (RFC 9110 section 5.6.2).
pub(super) fn field_name(text: &str) -> Result<String, String> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    match !text.is_empty() && text.bytes().all(is_token) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "\"{}\" is not a header's name: use letters, digits and -",
            before_value(text)
        )),
    }
}

/// A field's name as it is shown: a whole field may stand where only its name is to be, and its value be secret.
pub(super) fn before_value(text: &str) -> Cow<'_, str> {
    match text.find([':', '=']) {
        Some(at) => format!("{}…", &text[..=at]).into(),
        None => text.into(),
    }
}

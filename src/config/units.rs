//! Quantities as people write them: `250ms`, `64KiB`. Owns their spelling; must not know any key of the file.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::ser::{Serialize, Serializer};

/// A length of time: `250ms`, `10s`, `5m`, `2h`, `400d`, and sums of them such as `1h30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeLength(pub Duration);

/// A number of bytes: `512B`, `64KiB`, `10MiB`, `1GiB`, or by thousands `10kB`, `10MB`, `1GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A share: `50%`, from `0%` to `100%`; decimals allowed.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Percent(pub f64);

/// The permissions of a file, as chmod takes them: `660`. In quotes: YAML has other ideas of what a number with a zero ahead is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileMode(pub u32);

const TIMES: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

const SIZES: [(&str, u64); 7] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

impl FromStr for TimeLength {
    type Err = String;

    fn from_str(text: &str) -> Result<TimeLength, String> {
        let bad = || {
            format!(
                "\"{text}\" is not a duration: use whole numbers, each with ms, s, m, h or d right behind it, for example 250ms or 1m30s"
            )
        };
        let mut rest = text;
        let mut total = 0u64;
        while !rest.is_empty() || text.is_empty() {
            let (number, behind) = split_number(rest).ok_or_else(bad)?;
            let unit_end = behind
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(behind.len());
            let millis = scale(number, &behind[..unit_end], &TIMES).ok_or_else(bad)?;
            total = total.checked_add(millis).ok_or_else(bad)?;
            rest = &behind[unit_end..];
        }
        Ok(TimeLength(Duration::from_millis(total)))
    }
}

impl fmt::Display for TimeLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        let (unit, size) = TIMES
            .into_iter()
            .rev()
            .find(|(_, size)| millis >= *size && millis.is_multiple_of(*size))
            .unwrap_or(("s", 1_000));
        write!(f, "{}{unit}", millis / size)
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteSize, String> {
        split_number(text)
            .and_then(|(number, unit)| scale(number, unit.trim_start(), &SIZES))
            .map(ByteSize)
            .ok_or_else(|| format!("\"{text}\" is not a size: use a number and B, KiB, MiB, GiB, kB, MB or GB, for example 64KiB"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, size) = SIZES[..4]
            .iter()
            .rev()
            .find(|(_, size)| self.0 >= *size && self.0.is_multiple_of(*size))
            .unwrap_or(&("B", 1));
        write!(f, "{}{unit}", self.0 / size)
    }
}

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Percent, String> {
        let number = text
            .strip_suffix('%')
            .filter(|number| number.bytes().all(|b| b.is_ascii_digit() || b == b'.'));
        number
            .and_then(|number| number.parse::<f64>().ok())
            .filter(|number| (0.0..=100.0).contains(number))
            .map(|number| Percent(number / 100.0))
            .ok_or_else(|| {
                let mend = match text.parse::<f64>() {
                    // 1 is more likely a hundredth than the whole.
                    Ok(share) if (0.0..1.0).contains(&share) => Percent(share).to_string(),
                    Ok(number) if (1.0..=100.0).contains(&number) => format!("{number}%"),
                    Ok(_) | Err(_) => "0% to 100%, for example 50%".to_owned(),
                };
                format!("\"{text}\" is not a percentage: use {mend}")
            })
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Percent, D::Error> {
        struct WithItsSign;

        impl Visitor<'_> for WithItsSign {
            type Value = Percent;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a percentage, for example 50%")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Percent, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Percent, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<Percent, E> {
                self.visit_str(&number.to_string())
            }
        }

        deserializer.deserialize_any(WithItsSign)
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A share is a rounded hundredth of what was written: the shortest text that is read as this share is meant.
        let shortest = (0..15)
            .map(|decimals| format!("{:.decimals$}%", self.0 * 100.0))
            .find(|text| text.parse() == Ok(*self));
        match shortest {
            Some(text) => f.write_str(&text),
            None => write!(f, "{}%", self.0 * 100.0),
        }
    }
}

impl FromStr for FileMode {
    type Err = String;

    fn from_str(text: &str) -> Result<FileMode, String> {
        let mode = u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777 && !text.starts_with('+'));
        mode.map(FileMode)
            .ok_or_else(|| format!("\"{text}\" is not a mode of a file: use, for example, \"660\""))
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:03o}", self.0)
    }
}

impl<'de> Deserialize<'de> for FileMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FileMode, D::Error> {
        struct InQuotes;

        impl Visitor<'_> for InQuotes {
            type Value = FileMode;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mode in quotes, for example \"660\"")
            }

            // As YAML read it, which is not always as it was written.
            fn visit_u64<E: Error>(self, _: u64) -> Result<FileMode, E> {
                Err(E::custom(
                    "a number stands where a mode in quotes, for example \"660\" is needed",
                ))
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<FileMode, E> {
                self.visit_u64(0)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<FileMode, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(InQuotes)
    }
}

fn split_number(text: &str) -> Option<(u64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

fn scale(number: u64, unit: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (_, size) = units.iter().find(|(name, _)| *name == unit)?;
    number.checked_mul(*size)
}

macro_rules! as_text {
    ($name:ident, $pattern:literal) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                String::deserialize(deserializer)?
                    .parse()
                    .map_err(D::Error::custom)
            }
        }

        to_text!($name, $pattern);
    };
}

macro_rules! to_text {
    ($name:ident, $pattern:literal) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "pattern": $pattern})
            }
        }
    };
}

as_text!(TimeLength, r"^([0-9]+(ms|s|m|h|d))+$");
as_text!(ByteSize, r"^[0-9]+ *(B|KiB|MiB|GiB|kB|MB|GB)$");

to_text!(Percent, r"^[0-9.]+%$");
to_text!(FileMode, r"^[0-7]{1,4}$");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        let check = |text: &str, millis: Option<u64>| {
            assert_eq!(
                text.parse().ok(),
                millis.map(|millis| TimeLength(Duration::from_millis(millis))),
                "{text}"
            );
        };
        check("250ms", Some(250));
        check("10s", Some(10_000));
        check("1h30m", Some(5_400_000));
        check("400d", Some(34_560_000_000));
        check("0s", Some(0));
        for bad in [
            "",
            "10",
            "s",
            "1.5s",
            "-1s",
            "1 s",
            "1sec",
            "1s ",
            "99999999999999999999s",
            "999999999999999d",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let check = |text: &str, bytes: Option<u64>| {
            assert_eq!(text.parse().ok(), bytes.map(ByteSize), "{text}")
        };
        check("512B", Some(512));
        check("64KiB", Some(65_536));
        check("10 MB", Some(10_000_000));
        for bad in [
            "",
            "10",
            "KiB",
            "1.5MiB",
            "1kib",
            "99999999999999999999B",
            "99999999999999GiB",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn percentages_are_shares() {
        let check = |text: &str, share: Option<f64>| {
            assert_eq!(text.parse().ok(), share.map(Percent), "{text}")
        };
        check("50%", Some(0.5));
        check("0.5%", Some(0.005));
        for bad in ["", "%", "50", "101%", "-1%", "nan%", "1e1%", "50 %"] {
            check(bad, None);
        }
    }

    #[test]
    fn the_mend_is_what_was_likely_meant() {
        let percent = |text: &str| text.parse::<Percent>().unwrap_err();
        assert_eq!(percent("0.5"), "\"0.5\" is not a percentage: use 50%");
        assert_eq!(percent("0.01"), "\"0.01\" is not a percentage: use 1%");
        assert_eq!(percent("50"), "\"50\" is not a percentage: use 50%");
        assert_eq!(
            percent("half"),
            "\"half\" is not a percentage: use 0% to 100%, for example 50%"
        );
        let size = "10M".parse::<ByteSize>().unwrap_err();
        assert!(size.contains("B, KiB, MiB, GiB, kB, MB or GB"), "{size}");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(millis in 0u64..1 << 50, bytes in any::<u64>(), thousandths in 0u32..=100_000) {
            let span = TimeLength(Duration::from_millis(millis));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
            let percent = Percent(f64::from(thousandths) / 1_000.0 / 100.0);
            prop_assert!(percent.to_string().len() <= "99.999%".len(), "{}", percent);
            prop_assert_eq!(percent.to_string().parse(), Ok(percent));
        }
    }
}

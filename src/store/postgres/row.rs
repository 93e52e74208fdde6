//! An event as a row: from its encoding to the bytes that `COPY … WITH (FORMAT binary)` takes, and back from what a SELECT
//! finds. Pure.
//!
//! `detail` is what the other columns do not say. Its first byte tells how: [`REST`]: the encoding's version, then what is
//! behind the parts that the columns give; [`WHOLE`]: the whole encoding, where a column cannot hold its part exactly. Either
//! way the encoding comes back byte for byte.

use std::borrow::Cow;
use std::error::Error;
use std::net::IpAddr;

use bytes::{BufMut, BytesMut};
use thiserror::Error;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

use super::PostgresError;
use crate::event::{self, Columns, Micros, Parts, Traits, start_of};
use crate::store::audit::days::Day;

/// `COPY` with the columns that [`put`] writes.
pub const COPY: &str = "COPY weir.audit_events (day, boot_id, seq, time, client, username, label, route, method, path, \
     status, arrival, detail) FROM STDIN WITH (FORMAT binary)";

/// What a SELECT is to name for [`Fields::of`].
pub const COLUMNS: &str = "seq, time, client, username, label, route, method, path, status, detail";

/// What a COPY begins with: signature, flags, length of the header's extension.
pub const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// And ends with.
pub const TRAILER: &[u8] = &[0xff, 0xff];

/// First bytes of `detail`.
const REST: u8 = 0;
const WHOLE: u8 = 1;

/// Bytes of a user in a column: a b-tree takes some 2,700 (`BTMaxItemSize` of its pages of 8 KiB).
const LONGEST_USER: usize = 2_000;

/// Of [`COPY`].
const COPIED: i16 = 13;
/// What a row takes beside its texts and its detail, at most.
const FIXED: usize = 2 + 4 * COPIED as usize + 4 + 4 + 8 + 8 + 20 + 2 + 8;

/// What a row has of its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchColumns {
    pub day: Day,
    pub boot_id: i32,
    pub arrival: i64,
}

/// An encoding that is none, which [`crate::store::audit::batch::Batch::open`] has ruled out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the encoding of an event is damaged")]
pub struct Damaged;

/// Why a row does not say what weir wrote: it was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RowError {
    #[error("its detail is none that weir writes")]
    Detail,
    #[error("its columns say something else than its detail")]
    Columns,
}

/// A time as Postgres has it: `timestamptz`. What is beyond its range stands at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Micros);

/// A day as Postgres has it: `date`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Date(pub Day);

/// The columns of a row as they are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fields<'a> {
    pub seq: i64,
    /// Microseconds since 2000.
    time: i64,
    pub client: IpAddr,
    pub user: Option<&'a str>,
    pub label: Option<&'a str>,
    pub route: Option<&'a str>,
    pub method: &'a str,
    pub path: &'a str,
    pub status: i16,
    pub detail: &'a [u8],
}

/// Appends the row of an event.
pub fn put(buffer: &mut BytesMut, place: &BatchColumns, encoding: &[u8]) -> Result<(), Damaged> {
    let parts = Parts::of(encoding).ok_or(Damaged)?;
    let Parts {
        columns, traits, ..
    } = &parts;
    let texts = [
        columns.user,
        columns.label,
        traits.route,
        Some(traits.method),
        Some(traits.path),
    ];
    let held = Held::of(columns, traits);
    let exact = held.exact
        && parts.encoded_len() == encoding.len()
        && columns.user.is_none_or(|user| user.len() <= LONGEST_USER)
        && !texts.iter().flatten().any(|text| has_nul(text));
    let lengths = texts.iter().flatten().map(|text| text.len()).sum::<usize>();
    // A NUL becomes three bytes.
    buffer.reserve(FIXED + 3 * lengths + encoding.len());
    buffer.put_i16(COPIED);
    buffer.put_i32(4);
    buffer.put_i32(date(place.day));
    buffer.put_i32(4);
    buffer.put_i32(place.boot_id);
    buffer.put_i32(8);
    buffer.put_i64(held.seq);
    buffer.put_i32(8);
    buffer.put_i64(held.time);
    put_client(buffer, columns.client);
    for (n, text) in texts.into_iter().enumerate() {
        match text {
            Some(text) if exact => put_bytes(buffer, text.as_bytes()),
            Some(text) if n == 0 => put_bytes(buffer, held_user(text).as_bytes()),
            Some(text) => put_bytes(buffer, held_text(text).as_bytes()),
            None => buffer.put_i32(-1),
        }
    }
    buffer.put_i32(2);
    buffer.put_i16(held.status);
    buffer.put_i32(8);
    buffer.put_i64(place.arrival);
    let (kind, version, rest) = match exact {
        true => (REST, Some(parts.version), parts.tail),
        false => (WHOLE, None, encoding),
    };
    buffer.put_i32(length(1 + usize::from(version.is_some()) + rest.len()));
    buffer.put_u8(kind);
    if let Some(version) = version {
        buffer.put_u8(version);
    }
    buffer.put_slice(rest);
    Ok(())
}

impl<'a> Fields<'a> {
    /// Of a row that has [`COLUMNS`] from column `first` on.
    pub fn of(row: &'a Row, first: usize) -> Result<Fields<'a>, PostgresError> {
        Fields::read(row, first).map_err(|error| PostgresError::Nonsense(error.to_string()))
    }

    fn read(row: &'a Row, first: usize) -> Result<Fields<'a>, tokio_postgres::Error> {
        let Raw(time) = row.try_get(first + 1)?;
        let Client(client) = row.try_get(first + 2)?;
        Ok(Fields {
            seq: row.try_get(first)?,
            time,
            client,
            user: row.try_get(first + 3)?,
            label: row.try_get(first + 4)?,
            route: row.try_get(first + 5)?,
            method: row.try_get(first + 6)?,
            path: row.try_get(first + 7)?,
            status: row.try_get(first + 8)?,
            detail: row.try_get(first + 9)?,
        })
    }

    /// Whether its event is of a version that this weir cannot read.
    pub fn is_of_another_version(&self) -> bool {
        match self.detail {
            [REST | WHOLE, encoding @ ..] => event::is_of_another_version(encoding),
            _ => false,
        }
    }

    /// Appends the event's encoding to `buffer`; on an error there may be a part of it.
    pub fn encoding_into(&self, buffer: &mut Vec<u8>) -> Result<(), RowError> {
        match self.detail {
            [REST, version, tail @ ..] => {
                let unsigned = |number| u64::try_from(number).map_err(|_| RowError::Columns);
                let parts = Parts {
                    version: *version,
                    columns: Columns {
                        seq: unsigned(self.seq)?,
                        time: since_1970(self.time).ok_or(RowError::Columns)?,
                        client: self.client,
                        user: self.user,
                        label: self.label,
                    },
                    traits: Traits {
                        route: self.route,
                        method: self.method,
                        path: self.path,
                        status: u16::try_from(self.status).map_err(|_| RowError::Columns)?,
                    },
                    tail,
                };
                match parts.encode_into(buffer) {
                    true => Ok(()),
                    false => Err(RowError::Detail),
                }
            }
            [WHOLE, encoding @ ..] => {
                let parts = Parts::of(encoding).ok_or(RowError::Detail)?;
                buffer.extend_from_slice(encoding);
                match self.say(&parts) {
                    true => Ok(()),
                    false => Err(RowError::Columns),
                }
            }
            _ => Err(RowError::Detail),
        }
    }

    /// Whether the columns are those that [`put`] gives an event of these parts that they cannot hold exactly.
    fn say(&self, parts: &Parts<'_>) -> bool {
        let Parts {
            columns, traits, ..
        } = parts;
        let held = Held::of(columns, traits);
        let same =
            |found: Option<&str>, told: Option<&str>| found == told.map(held_text).as_deref();
        (self.seq, self.time, self.status) == (held.seq, held.time, held.status)
            && self.client == columns.client
            && self.user == columns.user.map(held_user).as_deref()
            && same(self.label, columns.label)
            && same(self.route, traits.route)
            && same(Some(self.method), Some(traits.method))
            && same(Some(self.path), Some(traits.path))
    }
}

/// An event's numbers as columns hold them.
struct Held {
    seq: i64,
    time: i64,
    status: i16,
    exact: bool,
}

impl Held {
    fn of(columns: &Columns<'_>, traits: &Traits<'_>) -> Held {
        let seq = i64::try_from(columns.seq);
        let time = since_2000(columns.time);
        let status = i16::try_from(traits.status);
        Held {
            exact: seq.is_ok() && since_1970(time) == Some(columns.time) && status.is_ok(),
            seq: seq.unwrap_or(i64::MAX),
            time,
            status: status.unwrap_or(i16::MAX),
        }
    }
}

fn has_nul(text: &str) -> bool {
    text.as_bytes().contains(&0)
}

/// A text as its column has it, which cannot hold NUL.
pub(super) fn held_text(text: &str) -> Cow<'_, str> {
    match has_nul(text) {
        true => Cow::Owned(text.replace('\0', "\u{fffd}")),
        false => Cow::Borrowed(text),
    }
}

/// A user as the column has it, whose b-tree takes no long ones.
pub(super) fn held_user(user: &str) -> Cow<'_, str> {
    match held_text(start_of(user, LONGEST_USER)) {
        Cow::Owned(held) => Cow::Owned(start_of(&held, LONGEST_USER).to_owned()),
        held @ Cow::Borrowed(_) => held,
    }
}

fn put_bytes(buffer: &mut BytesMut, bytes: &[u8]) {
    buffer.put_i32(length(bytes.len()));
    buffer.put_slice(bytes);
}

fn length(length: usize) -> i32 {
    i32::try_from(length).expect("a batch's body is far shorter")
}

/// As `inet`: family, bits, whether it is a network, length, bytes.
fn put_client(buffer: &mut BytesMut, client: IpAddr) {
    const V4: &[u8] = &[0, 0, 0, 8, 2, 32, 0, 4];
    const V6: &[u8] = &[0, 0, 0, 20, 3, 128, 0, 16];
    match client {
        IpAddr::V4(address) => {
            buffer.put_slice(V4);
            buffer.put_slice(&address.octets());
        }
        IpAddr::V6(address) => {
            buffer.put_slice(V6);
            buffer.put_slice(&address.octets());
        }
    }
}

/// From 1970 to 2000.
const EPOCH_DAYS: i32 = 10_957;
const EPOCH_MICROS: i64 = EPOCH_DAYS as i64 * 86_400_000_000;
/// The last moment of a `timestamptz`, before the year 294277.
const LAST: i64 = 9_223_371_331_199_999_999;

/// Microseconds since 2000 of a time; [`LAST`] for one beyond.
fn since_2000(time: Micros) -> i64 {
    let time = i128::from(time.0) - i128::from(EPOCH_MICROS);
    i64::try_from(time).map_or(LAST, |time| time.min(LAST))
}

/// `None` before 1970, and for what is not a time.
fn since_1970(time: i64) -> Option<Micros> {
    let time = i128::from(time) + i128::from(EPOCH_MICROS);
    u64::try_from(time).ok().map(Micros)
}

fn date(day: Day) -> i32 {
    i32::try_from(i64::from(day.0) - i64::from(EPOCH_DAYS)).unwrap_or(i32::MAX - 1)
}

type Unreadable = Box<dyn Error + Sync + Send>;

impl ToSql for Time {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Unreadable> {
        out.put_i64(since_2000(self.0));
        Ok(IsNull::No)
    }

    accepts!(TIMESTAMPTZ);
    to_sql_checked!();
}

impl<'a> FromSql<'a> for Time {
    fn from_sql(kind: &Type, raw: &'a [u8]) -> Result<Time, Unreadable> {
        let Raw(time) = Raw::from_sql(kind, raw)?;
        let time = since_1970(time).ok_or("a time before 1970")?;
        Ok(Time(time))
    }

    accepts!(TIMESTAMPTZ);
}

impl ToSql for Date {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Unreadable> {
        out.put_i32(date(self.0));
        Ok(IsNull::No)
    }

    accepts!(DATE);
    to_sql_checked!();
}

impl<'a> FromSql<'a> for Date {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Date, Unreadable> {
        let days = i64::from(i32::from_be_bytes(raw.try_into()?)) + i64::from(EPOCH_DAYS);
        Ok(Date(Day(u32::try_from(days)?)))
    }

    accepts!(DATE);
}

/// A `timestamptz` as it is written.
struct Raw(i64);

impl<'a> FromSql<'a> for Raw {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Raw, Unreadable> {
        Ok(Raw(i64::from_be_bytes(raw.try_into()?)))
    }

    accepts!(TIMESTAMPTZ);
}

/// An `inet` of one address.
struct Client(IpAddr);

impl<'a> FromSql<'a> for Client {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Client, Unreadable> {
        Ok(Client(match raw {
            [2, 32, _, 4, octets @ ..] => <[u8; 4]>::try_from(octets)?.into(),
            [3, 128, _, 16, octets @ ..] => <[u8; 16]>::try_from(octets)?.into(),
            _ => return Err("the address of a network, not of a client".into()),
        }))
    }

    accepts!(INET);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::AuditEvent;

    const PLACE: BatchColumns = BatchColumns {
        day: Day(20_782),
        boot_id: 7,
        arrival: 99,
    };

    /// The fields of the one row in `bytes`, as the COPY format has them.
    fn split(mut bytes: &[u8]) -> Vec<Option<&[u8]>> {
        let (count, rest) = bytes.split_first_chunk().unwrap();
        bytes = rest;
        let mut fields = Vec::new();
        for _ in 0..i16::from_be_bytes(*count) {
            let (length, rest) = bytes.split_first_chunk().unwrap();
            bytes = rest;
            fields.push(match usize::try_from(i32::from_be_bytes(*length)) {
                Ok(length) => {
                    let (field, rest) = bytes.split_at(length);
                    bytes = rest;
                    Some(field)
                }
                Err(_) => None,
            });
        }
        assert!(bytes.is_empty());
        fields
    }

    /// What a SELECT would find of it.
    fn found<'a>(fields: &[Option<&'a [u8]>]) -> Fields<'a> {
        let text = |n: usize| fields[n].map(|text| std::str::from_utf8(text).unwrap());
        let Client(client) = Client::from_sql(&Type::INET, fields[4].unwrap()).unwrap();
        Fields {
            seq: i64::from_be_bytes(fields[2].unwrap().try_into().unwrap()),
            time: i64::from_be_bytes(fields[3].unwrap().try_into().unwrap()),
            client,
            user: text(5),
            label: text(6),
            route: text(7),
            method: text(8).unwrap(),
            path: text(9).unwrap(),
            status: i16::from_be_bytes(fields[10].unwrap().try_into().unwrap()),
            detail: fields[12].unwrap(),
        }
    }

    fn event(
        texts: [String; 2],
        options: [Option<String>; 3],
        numbers: (u64, u64, u16),
        client: IpAddr,
    ) -> AuditEvent {
        let [method, path] = texts;
        let [user, label, route] = options;
        let (seq, time, status) = numbers;
        AuditEvent {
            seq,
            time: Micros(time),
            client,
            user,
            label,
            route,
            method,
            path,
            status,
            query: Some("b=\0".to_owned()),
            ..AuditEvent::sample()
        }
    }

    fn row(encoding: &[u8]) -> BytesMut {
        let mut buffer = BytesMut::new();
        put(&mut buffer, &PLACE, encoding).unwrap();
        buffer
    }

    fn rebuilt(fields: &Fields<'_>) -> Result<Vec<u8>, RowError> {
        let mut rebuilt = Vec::new();
        fields.encoding_into(&mut rebuilt).map(|()| rebuilt)
    }

    fn plain() -> AuditEvent {
        let texts = ["GET", "/a"].map(str::to_owned);
        let client = [10, 0, 0, 1].into();
        let time = 1_800_000_000_000_000;
        event(texts, [None, None, None], (3, time, 200), client)
    }

    proptest! {
        #[test]
        fn a_row_gives_the_encoding_back(
            texts in any::<[String; 2]>(),
            options in any::<[Option<String>; 3]>(),
            nul in any::<bool>(),
            numbers in any::<(u64, u64, u16)>(),
            client in any::<IpAddr>(),
        ) {
            let mut texts = texts;
            if nul {
                texts[1].push('\0');
            }
            let encoding = event(texts, options, numbers, client).encode_into(Vec::new());
            let row = row(&encoding);
            let fields = split(&row);
            prop_assert!(fields[5..10].iter().flatten().all(|text| !text.contains(&0)));
            prop_assert_eq!(rebuilt(&found(&fields)), Ok(encoding));
        }

        #[test]
        fn whatever_is_put_comes_back(mut bytes in proptest::collection::vec(0u8..4, 0..80)) {
            bytes.insert(0, 2);
            let mut buffer = BytesMut::new();
            if put(&mut buffer, &PLACE, &bytes).is_ok() {
                prop_assert_eq!(rebuilt(&found(&split(&buffer))), Ok(bytes));
            }
        }
    }

    #[test]
    fn a_number_written_longer_than_it_needs_comes_back() {
        let mut encoding = plain().encode_into(Vec::new());
        let time = encoding[9..]
            .iter()
            .position(|byte| byte & 0x80 == 0)
            .unwrap()
            + 9;
        encoding[time] |= 0x80;
        encoding.insert(time + 1, 0);
        let row = row(&encoding);
        assert_eq!(split(&row)[12].unwrap()[0], WHOLE);
        assert_eq!(rebuilt(&found(&split(&row))), Ok(encoding));
    }

    #[test]
    fn a_user_too_long_for_a_b_tree_comes_back_all_the_same() {
        for user in ["é".repeat(1_500), "\0".repeat(1_000) + &"a".repeat(1_500)] {
            let user = Some(user);
            let encoding = AuditEvent { user, ..plain() }.encode_into(Vec::new());
            let row = row(&encoding);
            let held = split(&row)[5].unwrap();
            assert!(held.len() > LONGEST_USER - 4 && held.len() <= LONGEST_USER);
            assert_eq!(rebuilt(&found(&split(&row))), Ok(encoding));
        }
    }

    #[test]
    fn columns_are_as_postgres_writes_them() {
        let row = row(&plain().encode_into(Vec::new()));
        let fields = split(&row);
        // 2026-11-25 is 9825 days after 2000-01-01.
        assert_eq!(fields[0], Some(&9_825i32.to_be_bytes()[..]));
        assert_eq!(fields[3], Some(&853_315_200_000_000i64.to_be_bytes()[..]));
        assert_eq!(fields[4], Some(&[2, 32, 0, 4, 10, 0, 0, 1][..]));
        assert_eq!((fields[5], fields[8]), (None, Some(&b"GET"[..])));
        assert_eq!(fields[12].unwrap()[..2], [REST, 2]);
    }

    #[test]
    fn changed_columns_are_told_where_the_detail_knows_better() {
        let mut event = plain();
        event.path = "/\0".to_owned();
        let encoding = event.encode_into(Vec::new());
        let row = row(&encoding);
        let fields = split(&row);
        let found = found(&fields);
        assert_eq!((found.path, rebuilt(&found)), ("/\u{fffd}", Ok(encoding)));
        for changed in [
            Fields {
                path: "/b",
                ..found
            },
            Fields {
                status: 500,
                ..found
            },
            Fields {
                user: Some("ann"),
                ..found
            },
        ] {
            assert_eq!(rebuilt(&changed), Err(RowError::Columns));
        }
        let detail = &[9, 9][..];
        assert_eq!(rebuilt(&Fields { detail, ..found }), Err(RowError::Detail));
    }
}

//! What answers are read by: each function takes one shape, and anything else is [`CallError::Nonsense`]. Must not know what is asked.

use redis::Value;

use super::CallError;

pub fn list(value: Value) -> Result<Vec<Value>, CallError> {
    match value {
        Value::Array(values) => Ok(values),
        _ => Err(CallError::Nonsense),
    }
}

/// As the text of a script or a command has it.
pub fn bytes(value: Value) -> Result<Vec<u8>, CallError> {
    match value {
        Value::BulkString(bytes) => Ok(bytes),
        Value::SimpleString(text) => Ok(text.into_bytes()),
        _ => Err(CallError::Nonsense),
    }
}

pub fn text(value: &Value) -> Result<&str, CallError> {
    match value {
        Value::BulkString(bytes) => str::from_utf8(bytes).map_err(|_| CallError::Nonsense),
        Value::SimpleString(text) => Ok(text),
        _ => Err(CallError::Nonsense),
    }
}

/// A whole number that is not negative.
pub fn number(value: &Value) -> Result<u64, CallError> {
    match value {
        Value::Int(number) => u64::try_from(*number).map_err(|_| CallError::Nonsense),
        _ => Err(CallError::Nonsense),
    }
}

/// Whether it is 1: scripts say yes so, and commands that they found the one that was named.
pub fn is_one(value: &Value) -> Result<bool, CallError> {
    Ok(number(value)? == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_shape_is_nonsense() {
        assert_eq!(list(Value::Nil), Err(CallError::Nonsense));
        assert_eq!(bytes(Value::Int(1)), Err(CallError::Nonsense));
        assert_eq!(
            text(&Value::BulkString(vec![0xff])),
            Err(CallError::Nonsense)
        );
        assert_eq!(text(&Value::SimpleString("a".to_owned())), Ok("a"));
        assert_eq!(number(&Value::Int(-1)), Err(CallError::Nonsense));
        assert_eq!(
            is_one(&Value::BulkString(b"1".into())),
            Err(CallError::Nonsense)
        );
        assert_eq!(
            [0, 1, 2].map(|n| is_one(&Value::Int(n))),
            [Ok(false), Ok(true), Ok(false)]
        );
    }
}

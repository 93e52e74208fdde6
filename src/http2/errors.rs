//! The codes by which HTTP/2 says why it ends a stream or a connection (RFC 9113 section 7), as they are named.

/// The name of this code, as a label; all that the RFC does not name are one.
pub fn name(code: u32) -> &'static str {
    match code {
        0 => "no_error",
        1 => "protocol_error",
        2 => "internal_error",
        3 => "flow_control_error",
        4 => "settings_timeout",
        5 => "stream_closed",
        6 => "frame_size_error",
        7 => "refused_stream",
        8 => "cancel",
        9 => "compression_error",
        10 => "connect_error",
        11 => "enhance_your_calm",
        12 => "inadequate_security",
        13 => "http_1_1_required",
        _ => "other",
    }
}

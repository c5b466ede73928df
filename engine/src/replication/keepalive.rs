//! Noticing that the peer of a TCP connection is gone: keepalives and the time that unanswered data may take.
//!
//! A backup reads for hours and a WAL stream for weeks: without these, a firewall that forgets a connection
//! would leave us waiting for ever. Defaults are shorter than the system's; conninfo may change them.

use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use crate::error::{Error, Result};

/// Settings of a TCP connection, as libpq names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// `keepalives`
    enabled: bool,
    /// `keepalives_idle`
    idle: Duration,
    /// `keepalives_interval`
    interval: Duration,
    /// `keepalives_count`
    count: u32,
    /// `tcp_user_timeout`
    user_timeout: Duration,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            enabled: true,
            idle: Duration::from_secs(60),
            interval: Duration::from_secs(10),
            count: 6,
            user_timeout: Duration::from_secs(120),
        }
    }
}

impl Keepalive {
    /// From the values of a conninfo. Zero means the default, as with libpq.
    pub fn parse(get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |key: &str| -> Result<Option<u64>> {
            let Some(text) = get(key) else { return Ok(None) };
            let parsed = text.trim().parse::<u32>();
            let number = parsed.map_err(|_| Error::usage(format!("{key}={text:?} is not possible: a number")))?;
            Ok(Some(u64::from(number)).filter(|n| *n > 0))
        };
        let standard = Self::default();
        let seconds = |key: &str, standard: Duration| -> Result<Duration> {
            Ok(number(key)?.map_or(standard, Duration::from_secs))
        };
        Ok(Self {
            enabled: get("keepalives").is_none_or(|text| text.trim() != "0"),
            idle: seconds("keepalives_idle", standard.idle)?,
            interval: seconds("keepalives_interval", standard.interval)?,
            count: number("keepalives_count")?.map_or(standard.count, |n| n as u32),
            user_timeout: number("tcp_user_timeout")?.map_or(standard.user_timeout, Duration::from_millis),
        })
    }

    /// Applies them; a system that refuses one of them is no reason not to connect.
    pub fn apply(&self, socket: &TcpStream) {
        let socket = SockRef::from(socket);
        if self.enabled {
            let settings = TcpKeepalive::new()
                .with_time(self.idle)
                .with_interval(self.interval)
                .with_retries(self.count);
            let _ = socket.set_tcp_keepalive(&settings);
        }
        let _ = socket.set_tcp_user_timeout(Some(self.user_timeout));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_libpq() {
        let get = |key: &str| match key {
            "keepalives_idle" => Some("5".to_owned()),
            "keepalives_count" => Some("0".to_owned()),
            "tcp_user_timeout" => Some("1500".to_owned()),
            _ => None,
        };
        let parsed = Keepalive::parse(&get).unwrap();
        assert_eq!(parsed.idle, Duration::from_secs(5));
        assert_eq!(parsed.count, Keepalive::default().count);
        assert_eq!(parsed.user_timeout, Duration::from_millis(1500));
        assert!(Keepalive::parse(&|key| (key == "keepalives_idle").then(|| "soon".to_owned())).is_err());
    }
}

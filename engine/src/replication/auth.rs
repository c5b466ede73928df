//! Authentication: trust, password, md5, SCRAM-SHA-256 and SCRAM-SHA-256-PLUS.

use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ChannelBinding, ScramSha256};
use postgres_protocol::message::backend::Message as M;
use postgres_protocol::message::frontend;
use zeroize::Zeroize;

use super::codec::{Message, broken, server_error};
use super::connection::Wire;
use super::conninfo::{ConnInfo, Host};
use crate::error::{Error, Result};

/// Answers the server until it is satisfied. `binding` is the TLS channel's end point, if there is TLS.
pub async fn authenticate(
    wire: &mut Wire,
    info: &ConnInfo,
    host: &Host,
    database: &str,
    binding: Option<Option<Vec<u8>>>,
) -> Result<()> {
    let password = || {
        info.password_for(host, database).ok_or_else(|| {
            Error::failed(format!(
                "server {} asks for a password of {} and none is given",
                host.name, info.user
            ))
            .remedy("use a password file (~/.pgpass, mode 0600) or PGPASSWORD")
        })
    };
    let mut out = BytesMut::new();
    let mut scram: Option<ScramSha256> = None;
    let mut bound = false;
    loop {
        let Message::Other(message) = wire.receive().await? else {
            return Err(broken("copy data during authentication"));
        };
        out.clear();
        match message {
            M::AuthenticationOk => {
                if scram.is_some() {
                    return Err(broken(
                        "authentication ended before the server proved that it knows the password",
                    ));
                }
                if info.require_channel_binding && !bound {
                    return Err(Error::refused("channel_binding=require, and the server did not use it"));
                }
                return Ok(());
            }
            M::AuthenticationCleartextPassword => {
                if !wire.is_private() {
                    return Err(Error::refused(
                        "the server asks for the password in clear text over an unencrypted connection",
                    )
                    .remedy("use sslmode=require or better, or SCRAM"));
                }
                let password = password()?;
                // A buffer that grows leaves parts of the password behind.
                out.reserve(password.len() + 16);
                frontend::password_message(password.as_bytes(), &mut out).map_err(|e| broken(e.to_string()))?;
            }
            M::AuthenticationMd5Password(body) => {
                let answer = md5_hash(info.user.as_bytes(), password()?.as_bytes(), body.salt());
                frontend::password_message(answer.as_bytes(), &mut out).map_err(|e| broken(e.to_string()))?;
            }
            M::AuthenticationSasl(body) => {
                let offered: Vec<String> = body
                    .mechanisms()
                    .map(|m| Ok(m.to_owned()))
                    .collect()
                    .map_err(|e| broken(e.to_string()))?;
                let plus = offered.iter().any(|m| m == sasl::SCRAM_SHA_256_PLUS) && !info.disable_channel_binding;
                let (mechanism, channel) = match &binding {
                    Some(Some(hash)) if plus => {
                        bound = true;
                        (
                            sasl::SCRAM_SHA_256_PLUS,
                            ChannelBinding::tls_server_end_point(hash.clone()),
                        )
                    }
                    Some(Some(_)) if !info.disable_channel_binding => {
                        (sasl::SCRAM_SHA_256, ChannelBinding::unrequested())
                    }
                    _ => (sasl::SCRAM_SHA_256, ChannelBinding::unsupported()),
                };
                if !offered.iter().any(|m| m == mechanism) {
                    return Err(Error::failed(format!(
                        "the server offers only {offered:?} for authentication"
                    )));
                }
                let client = ScramSha256::new(password()?.as_bytes(), channel);
                frontend::sasl_initial_response(mechanism, client.message(), &mut out)
                    .map_err(|e| broken(e.to_string()))?;
                scram = Some(client);
            }
            M::AuthenticationSaslContinue(body) => {
                let client = scram.as_mut().ok_or_else(|| broken("SASL data without a mechanism"))?;
                client.update(body.data()).map_err(|e| broken(e.to_string()))?;
                frontend::sasl_response(client.message(), &mut out).map_err(|e| broken(e.to_string()))?;
            }
            M::AuthenticationSaslFinal(body) => {
                let mut client = scram.take().ok_or_else(|| broken("SASL data without a mechanism"))?;
                client.finish(body.data()).map_err(|e| {
                    Error::refused("the server could not prove that it knows the password").caused_by(e)
                })?;
            }
            M::ErrorResponse(body) => {
                return Err(
                    server_error(body.fields()).context(format_args!("connecting to {} as {}", host.name, info.user))
                );
            }
            M::NoticeResponse(_) => {}
            _ => {
                return Err(Error::failed(
                    "the server asks for a way of authentication that is not supported (GSSAPI, SSPI or another)",
                ));
            }
        }
        if !out.is_empty() {
            let sent = wire.send(&out).await;
            // It may hold the password.
            out[..].zeroize();
            sent?;
        }
    }
}

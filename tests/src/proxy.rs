//! A proxy between fairvault and a server or a store, which can be told to misbehave.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;

/// Where connections go.
#[derive(Debug, Clone)]
pub enum Target {
    /// A port of this machine.
    Port(u16),
    /// A Unix socket.
    Socket(PathBuf),
    /// A port of this machine, whatever host the client asks an HTTP proxy (CONNECT) for.
    Tunnel(u16),
    /// An S3 server on a port of this machine, for a client that speaks as to Google's store.
    Gcs(u16),
    /// An S3 server on a port of this machine that is guarded: which requests pass, the function says.
    Guarded(u16, Allows),
}

/// Whether a holder of an access key may make a request.
pub type Allows = fn(&S3Request<'_>) -> bool;

/// A request to an S3 server.
#[derive(Debug)]
pub struct S3Request<'a> {
    /// Whose access key signed it; empty if none did.
    pub key: &'a str,
    /// GET, PUT, …
    pub method: &'a str,
    /// `/bucket/name?query`.
    pub path: &'a str,
    /// What is asked for about settings; empty where content is sent.
    pub body: &'a str,
}

/// How it treats connections, now and from now on.
#[derive(Debug, Default)]
struct Mood {
    /// No connection gets through.
    away: AtomicBool,
    /// Bytes a second in each direction; 0 for no limit.
    rate: AtomicU64,
    /// After so many more bytes to the client, its connection is cut, wherever that is; 0 for never.
    cut_after: AtomicU64,
    /// How long what is said takes to arrive, in either direction; microseconds.
    delay_us: AtomicU64,
    /// HTTP requests that passed.
    requests: AtomicU64,
    /// Requests that were refused.
    denied: Mutex<Vec<String>>,
}

/// A running proxy; its connections end when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Its port.
    pub port: u16,
    mood: Arc<Mood>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    hosts: Arc<Mutex<Vec<String>>>,
    stopped: Arc<AtomicBool>,
}

trait Half: Read + Write + Send {
    fn other(&self) -> Result<Box<dyn Half>>;
    fn close(&self);
}

impl Half for TcpStream {
    fn other(&self) -> Result<Box<dyn Half>> {
        Ok(Box::new(self.try_clone()?))
    }
    fn close(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Half for UnixStream {
    fn other(&self) -> Result<Box<dyn Half>> {
        Ok(Box::new(self.try_clone()?))
    }
    fn close(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

fn connect(target: &Target) -> Result<Box<dyn Half>> {
    Ok(match target {
        Target::Port(port) | Target::Tunnel(port) | Target::Gcs(port) | Target::Guarded(port, _) => {
            let stream = TcpStream::connect(("127.0.0.1", *port))?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        Target::Socket(path) => Box::new(UnixStream::connect(path)?),
    })
}

/// Copies one direction until it ends, then ends both; everything arrives `delay` later than it was sent, whatever else
/// is under way.
fn copy_late(mut from: Box<dyn Half>, mut to: Box<dyn Half>, mood: &Mood, to_client: bool, delay: Duration) {
    let (sent, arriving) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(1024);
    let Ok(source) = from.other() else { return };
    let deliver = std::thread::spawn(move || {
        for (due, bytes) in arriving {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        source.close();
        to.close();
    });
    let mut buffer = vec![0u8; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if !to_client {
            mood.count(&buffer[..n]);
        }
        if sent.send((Instant::now() + delay, buffer[..n].to_vec())).is_err() {
            break;
        }
    }
    drop(sent);
    let _ = deliver.join();
}

impl Mood {
    /// Counts a request whose head begins here: clients write each at once.
    fn count(&self, bytes: &[u8]) {
        let is_request = ["GET ", "PUT ", "POST ", "HEAD ", "DELETE "]
            .iter()
            .any(|method| bytes.starts_with(method.as_bytes()));
        self.requests.fetch_add(is_request.into(), Ordering::Relaxed);
    }
}

/// Copies one direction until it ends, then ends both.
fn copy(mut from: Box<dyn Half>, mut to: Box<dyn Half>, mood: &Mood, to_client: bool) {
    let delay = Duration::from_micros(mood.delay_us.load(Ordering::Relaxed));
    if !delay.is_zero() {
        return copy_late(from, to, mood, to_client, delay);
    }
    let mut buffer = [0u8; 16 << 10];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        if mood.away.load(Ordering::Relaxed) {
            break;
        }
        if !to_client {
            mood.count(&buffer[..n]);
        }
        let rate = mood.rate.load(Ordering::Relaxed);
        if rate > 0 {
            std::thread::sleep(Duration::from_secs_f64(n as f64 / rate as f64));
        }
        let left = mood.cut_after.load(Ordering::Relaxed);
        if to_client && left > 0 {
            if left <= n as u64 {
                mood.cut_after.store(0, Ordering::Relaxed);
                let _ = to.write_all(&buffer[..left as usize]);
                break;
            }
            mood.cut_after.store(left - n as u64, Ordering::Relaxed);
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    from.close();
    to.close();
}

impl Proxy {
    /// Starts it on a port of its own.
    pub fn start(target: Target) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let this = Self {
            port: listener.local_addr()?.port(),
            mood: Arc::default(),
            open: Arc::default(),
            hosts: Arc::default(),
            stopped: Arc::default(),
        };
        let (mood, open, stopped) = (this.mood.clone(), this.open.clone(), this.stopped.clone());
        let hosts = this.hosts.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                if mood.away.load(Ordering::Relaxed) {
                    continue;
                }
                let _ = serve(client, &target, &mood, &open, &hosts);
            }
        });
        Ok(this)
    }

    /// Nothing gets through any more, and what is open ends; or all is well again.
    pub fn away(&self, away: bool) {
        self.mood.away.store(away, Ordering::Relaxed);
        if away {
            self.cut();
        }
    }

    /// Bytes a second in each direction of each connection; 0 for no limit.
    pub fn rate(&self, rate: u64) {
        self.mood.rate.store(rate, Ordering::Relaxed);
    }

    /// Cuts a connection after so many more bytes to its client, in the middle of whatever that is.
    pub fn cut_after(&self, bytes: u64) {
        self.mood.cut_after.store(bytes, Ordering::Relaxed);
    }

    /// Connections made from now on: half of it passes before what is said arrives on the other side.
    pub fn round_trip(&self, time: Duration) {
        self.mood.delay_us.store(time.as_micros() as u64 / 2, Ordering::Relaxed);
    }

    /// HTTP requests that passed so far, if they were not encrypted.
    pub fn requests(&self) -> u64 {
        self.mood.requests.load(Ordering::Relaxed)
    }

    /// Requests that the guard has refused since this was asked last: access key, method and path.
    pub fn denied(&self) -> Vec<String> {
        let denied = self.mood.denied.lock();
        std::mem::take(&mut denied.unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Hosts that clients of a tunnel have asked for.
    pub fn hosts(&self) -> Vec<String> {
        let hosts = self.hosts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        hosts.clone()
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        let mut open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for stream in open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Reads one HTTP head; empty at the end.
fn read_head(from: &mut dyn Half) -> Result<String> {
    let mut head = Vec::new();
    let mut byte = [0u8];
    while !head.ends_with(b"\r\n\r\n") && from.read(&mut byte)? == 1 {
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Passes requests on in S3's words: what Google calls a generation that must be 0 is "if none matches any".
fn translate(mut from: Box<dyn Half>, mut to: Box<dyn Half>) -> Result<()> {
    loop {
        let head = read_head(&mut *from)?;
        if head.is_empty() {
            to.close();
            return Ok(());
        }
        let mut lines: Vec<String> = Vec::new();
        let mut length = 0u64;
        for line in head.trim_end().lines() {
            let (name, value) = line.split_once(": ").unwrap_or((line, ""));
            match name.to_ascii_lowercase().as_str() {
                "x-goog-if-generation-match" if value == "0" => lines.push("if-none-match: *".to_owned()),
                "authorization" => {}
                "content-length" => {
                    length = value.parse()?;
                    lines.push(line.to_owned());
                }
                _ => lines.push(line.to_owned()),
            }
        }
        to.write_all(format!("{}\r\n\r\n", lines.join("\r\n")).as_bytes())?;
        std::io::copy(&mut Read::take(&mut *from, length), &mut *to)?;
    }
}

/// A path without the signature in its query: the server behind knows other keys.
fn unsigned(path: &str) -> String {
    let Some((name, query)) = path.split_once('?') else {
        return path.to_owned();
    };
    let rest: Vec<&str> = query.split('&').filter(|part| !part.starts_with("X-Amz-")).collect();
    format!("{name}?{}", rest.join("&"))
}

/// The longest body that is looked at.
const SHORT_BODY: u64 = 16 << 10;

/// Passes on what is allowed, and answers the rest as S3 does.
fn guard(
    mut from: Box<dyn Half>,
    mut to: Box<dyn Half>,
    mut back: Box<dyn Half>,
    allows: Allows,
    mood: &Mood,
) -> Result<()> {
    loop {
        let head = read_head(&mut *from)?;
        if head.is_empty() {
            to.close();
            return Ok(());
        }
        let value = |wanted: &str| {
            let mut lines = head.lines().filter_map(|line| line.split_once(": "));
            let found = lines.find(|(name, _)| name.eq_ignore_ascii_case(wanted));
            found.map_or("", |(_, value)| value)
        };
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        // A request is signed in a header, or in its query, where slashes are written otherwise.
        let signed = [value("authorization"), path].into_iter();
        let key = signed
            .filter_map(|text| Some(text.split_once("Credential=")?.1))
            .find_map(|rest| rest.split(['/', '%']).next());
        let length = value("content-length").parse().unwrap_or(0);
        let mut body = Read::take(&mut *from, length);
        let mut short = Vec::new();
        if path.contains('?') && length <= SHORT_BODY {
            body.read_to_end(&mut short)?;
        }
        let request = S3Request {
            method,
            path,
            key: key.unwrap_or_default(),
            body: &String::from_utf8_lossy(&short),
        };
        if allows(&request) {
            to.write_all(head.replacen(path, &unsigned(path), 1).as_bytes())?;
            to.write_all(&short)?;
            std::io::copy(&mut body, &mut *to)?;
            continue;
        }
        std::io::copy(&mut body, &mut std::io::sink())?;
        let line = format!("{} {} {}", request.key, request.method, request.path);
        let mut denied = mood.denied.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        denied.push(line);
        drop(denied);
        let answer = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>";
        let size = answer.len();
        let head = format!("HTTP/1.1 403 Forbidden\r\ncontent-type: application/xml\r\ncontent-length: {size}\r\n\r\n");
        back.write_all((head + answer).as_bytes())?;
    }
}

fn serve(
    mut client: TcpStream,
    target: &Target,
    mood: &Arc<Mood>,
    open: &Mutex<Vec<TcpStream>>,
    hosts: &Mutex<Vec<String>>,
) -> Result<()> {
    client.set_nodelay(true)?;
    let server = connect(target)?;
    if matches!(target, Target::Tunnel(_)) {
        let head = read_head(&mut client)?;
        let host = head.split(' ').nth(1).unwrap_or_default().to_owned();
        hosts
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .push(host);
        client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
    }
    open.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .push(client.try_clone()?);
    let (up, down) = (mood.clone(), mood.clone());
    let (client_in, server_out) = (client.other()?, server.other()?);
    match target {
        Target::Guarded(_, allows) => {
            let (back, allows) = (client.other()?, *allows);
            std::thread::spawn(move || guard(client_in, server_out, back, allows, &up));
        }
        Target::Gcs(_) => _ = std::thread::spawn(move || translate(client_in, server_out)),
        _ => _ = std::thread::spawn(move || copy(client_in, server_out, &up, false)),
    }
    std::thread::spawn(move || copy(server, Box::new(client), &down, true));
    Ok(())
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.away(true);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

//! A proxy between fairvault and a server or a store, which can be told to misbehave.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;

/// Where connections go.
#[derive(Debug, Clone)]
pub enum Target {
    /// A port of this machine.
    Port(u16),
    /// A Unix socket.
    Socket(PathBuf),
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
}

/// A running proxy; its connections end when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Its port.
    pub port: u16,
    mood: Arc<Mood>,
    open: Arc<Mutex<Vec<TcpStream>>>,
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
        Target::Port(port) => {
            let stream = TcpStream::connect(("127.0.0.1", *port))?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        Target::Socket(path) => Box::new(UnixStream::connect(path)?),
    })
}

/// Copies one direction until it ends, then ends both.
fn copy(mut from: Box<dyn Half>, mut to: Box<dyn Half>, mood: &Mood, to_client: bool) {
    let mut buffer = [0u8; 16 << 10];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        if mood.away.load(Ordering::Relaxed) {
            break;
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
            stopped: Arc::default(),
        };
        let (mood, open, stopped) = (this.mood.clone(), this.open.clone(), this.stopped.clone());
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                if mood.away.load(Ordering::Relaxed) {
                    continue;
                }
                let _ = serve(client, &target, &mood, &open);
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

    /// Cuts all connections.
    pub fn cut(&self) {
        let mut open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for stream in open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn serve(client: TcpStream, target: &Target, mood: &Arc<Mood>, open: &Mutex<Vec<TcpStream>>) -> Result<()> {
    client.set_nodelay(true)?;
    let server = connect(target)?;
    open.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .push(client.try_clone()?);
    let (up, down) = (mood.clone(), mood.clone());
    let (client_in, server_out) = (client.other()?, server.other()?);
    std::thread::spawn(move || copy(client_in, server_out, &up, false));
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

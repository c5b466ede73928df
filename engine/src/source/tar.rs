//! The tar archives that PostgreSQL sends: ustar headers, files, folders, symbolic links.
//!
//! Data arrives in pieces of any size. The parser never holds more than one header.

use crate::error::{Error, Result};

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file with this many bytes to follow.
    File,
    /// A folder.
    Directory,
    /// A symbolic link.
    Symlink(String),
}

/// A tar header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Path, as sent, without `./` in front or `/` behind.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Length of the content, bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Seconds since 1970.
    pub mtime_s: i64,
}

/// What the next bytes are.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// An entry begins.
    Entry(Header),
    /// Content of the entry.
    Data(&'a [u8]),
    /// The content of the entry is complete (also for empty files).
    EntryEnd,
}

enum State {
    Header { have: usize },
    Content { left: u64, padding: usize },
    Ending { padding: usize },
    Padding { left: usize },
}

/// A tar parser; feed it with [`Parser::next`] until it takes no more.
pub struct Parser {
    state: State,
    block: [u8; BLOCK],
}

impl Default for Parser {
    fn default() -> Self {
        Self {
            state: State::Header { have: 0 },
            block: [0; BLOCK],
        }
    }
}

impl Parser {
    /// Takes bytes from the front of `input` up to the next event; `None` when more input is needed.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>> {
        loop {
            match &mut self.state {
                State::Header { have } => {
                    let take = (BLOCK - *have).min(input.len());
                    let (now, rest) = input.split_at(take);
                    *input = rest;
                    self.block[*have..*have + take].copy_from_slice(now);
                    *have += take;
                    if *have < BLOCK {
                        return Ok(None);
                    }
                    *have = 0;
                    if self.block.iter().all(|&b| b == 0) {
                        continue;
                    }
                    let header = parse_header(&self.block)?;
                    if header.kind == Kind::File {
                        let padding = (BLOCK - (header.size % BLOCK as u64) as usize) % BLOCK;
                        self.state = State::Content {
                            left: header.size,
                            padding,
                        };
                    }
                    return Ok(Some(Event::Entry(header)));
                }
                State::Content { left: 0, padding } => {
                    self.state = State::Ending { padding: *padding };
                }
                State::Content { left, .. } => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let take = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                    let (now, rest) = input.split_at(take);
                    *input = rest;
                    *left -= take as u64;
                    return Ok(Some(Event::Data(now)));
                }
                State::Ending { padding } => {
                    self.state = State::Padding { left: *padding };
                    return Ok(Some(Event::EntryEnd));
                }
                State::Padding { left } => {
                    let take = (*left).min(input.len());
                    *input = &input[take..];
                    *left -= take;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = State::Header { have: 0 };
                }
            }
        }
    }

    /// Whether the archive may end here: not inside an entry.
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header { have: 0 } | State::Padding { left: 0 })
    }
}

fn parse_header(block: &[u8; BLOCK]) -> Result<Header> {
    let broken = |why: &str| Error::damaged(format!("the server's tar archive is broken: {why}"));
    let sum: u32 = block
        .iter()
        .enumerate()
        .map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u32::from(b) })
        .sum();
    if number(&block[148..156]) != Some(u64::from(sum)) {
        return Err(broken("a header checksum is wrong"));
    }
    let name = text(&block[..100]).ok_or_else(|| broken("a file name is not UTF-8; fairvault cannot back it up"))?;
    let path = name.strip_prefix("./").unwrap_or(name).trim_end_matches('/').to_owned();
    let kind = match block[156] {
        b'0' | 0 => Kind::File,
        b'5' => Kind::Directory,
        b'2' => Kind::Symlink(
            text(&block[157..257])
                .ok_or_else(|| broken("a link target is not UTF-8"))?
                .to_owned(),
        ),
        other => return Err(broken(&format!("entry {path:?} has type {:?}", other as char))),
    };
    let size = number(&block[124..136]).ok_or_else(|| broken("a size is no number"))?;
    Ok(Header {
        path,
        size: if kind == Kind::File { size } else { 0 },
        kind,
        mode: number(&block[100..108]).ok_or_else(|| broken("a mode is no number"))? as u32 & 0o7777,
        mtime_s: number(&block[136..148])
            .and_then(|n| i64::try_from(n).ok())
            .ok_or_else(|| broken("a time is no number"))?,
    })
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field.split(|&b| b == 0).next()?).ok()
}

/// An octal number, or a binary one if the highest bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let first = u64::from(field[0] & 0x7F);
        return field[1..]
            .iter()
            .try_fold(first, |n, &b| n.checked_mul(256)?.checked_add(b.into()));
    }
    let digits = field
        .iter()
        .copied()
        .skip_while(|&b| b == b' ')
        .take_while(|&b| b != 0 && b != b' ');
    digits.into_iter().try_fold(0u64, |n, b| {
        (b'0'..=b'7')
            .contains(&b)
            .then(|| n.checked_mul(8)?.checked_add((b - b'0').into()))
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, size: u64, kind: u8) -> Vec<u8> {
        let mut block = vec![0u8; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000600");
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[136..147].copy_from_slice(b"00000000001");
        block[156] = kind;
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u32::from(b) })
            .sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }

    fn archive() -> Vec<u8> {
        let mut bytes = header("a/b", 700, b'0');
        bytes.extend(vec![7; 700]);
        bytes.extend(vec![0; 324]);
        bytes.extend(header("d/", 0, b'5'));
        bytes.extend(header("empty", 0, b'0'));
        bytes
    }

    #[test]
    fn any_cut_gives_the_same_events() {
        let bytes = archive();
        for step in [1, 3, 511, 512, 513, bytes.len()] {
            let mut parser = Parser::default();
            let (mut names, mut content, mut ends) = (Vec::new(), 0, 0);
            for piece in bytes.chunks(step) {
                let mut input = piece;
                while let Some(event) = parser.next(&mut input).unwrap() {
                    match event {
                        Event::Entry(header) => names.push(header.path),
                        Event::Data(data) => content += data.len(),
                        Event::EntryEnd => ends += 1,
                    }
                }
            }
            assert_eq!(
                (names, content, ends),
                (vec!["a/b".into(), "d".into(), "empty".to_owned()], 700, 2),
                "step {step}"
            );
            assert!(parser.at_boundary());
        }
    }

    #[test]
    fn damage_is_an_error() {
        let mut bytes = archive();
        bytes[3] ^= 1;
        assert!(Parser::default().next(&mut &bytes[..]).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_refused_or_parsed(bytes: Vec<u8>) {
            let mut parser = Parser::default();
            let mut input = &bytes[..];
            while let Ok(Some(_)) = parser.next(&mut input) {}
        }
    }
}

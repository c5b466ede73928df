//! Properties of every codec: what is sealed opens, what is changed does not, and nothing panics.

use fairvault_format::frame::{FRAME_HEADER_LEN, FrameKey, decode_chunk};
use fairvault_format::header::{Kind, ObjectHeader};
use fairvault_format::index::{IndexEntry, IndexRun, PackRef, open_run, seal_run};
use fairvault_format::journal::Journal;
use fairvault_format::keys::{self, EpochKeys, KeyRole, Scope, Secret};
use fairvault_format::object::{ObjectReader, ObjectWriter, compress};
use fairvault_format::proto::WalHeader;
use fairvault_format::{names, pack};
use proptest::prelude::*;

const SCOPE: Scope = Scope {
    repository: [1; 16],
    stanza: [2; 16],
};

fn epoch_keys() -> EpochKeys {
    EpochKeys {
        epoch: 3,
        data_key: Some([1; 32]),
        data_private_key: None,
        id_key: [2; 32],
        meta_key: [3; 32],
        writer_seed: None,
        operator_seed: None,
        public_keys: Default::default(),
    }
}

proptest! {
    #[test]
    fn journals_give_back_what_is_whole(runs: Vec<Vec<u8>>, salt: [u8; 32], cut: prop::sample::Index, flip: prop::sample::Index) {
        let keys = epoch_keys();
        let head = WalHeader { name: "x".to_owned(), start_lsn: 7, ..Default::default() };
        let (mut journal, mut bytes) = Journal::begin(&keys, &SCOPE, salt, "a.wal", &head).unwrap();
        let mut ends = vec![bytes.len()];
        for run in &runs {
            bytes.extend(journal.seal(run).unwrap());
            ends.push(bytes.len());
        }
        let read = |bytes: &[u8], name: &str| -> (Option<WalHeader>, Vec<Vec<u8>>) {
            let (mut head, mut out) = (None, Vec::new());
            let Ok(mut journal) = Journal::open(&keys, &SCOPE, bytes, name) else { return (head, out) };
            let mut at = 80;
            while let Some(Ok(len)) = bytes.get(at..).map(|rest| journal.section_len(rest))
                && let Some(section) = bytes.get(at..at + len)
            {
                at += len;
                match &head {
                    None => match journal.head(section) {
                        Ok(read) => head = Some(read),
                        Err(_) => break,
                    },
                    Some(_) => match journal.content(section) {
                        Ok(run) => out.push(run),
                        Err(_) => break,
                    },
                }
            }
            (head, out)
        };
        prop_assert_eq!(read(&bytes, "a.wal"), (Some(head), runs.clone()));
        prop_assert_eq!(read(&bytes, "b.wal").0, None);
        let whole = |len: usize| ends.iter().filter(|&&end| end <= len).count().saturating_sub(1);
        let cut = cut.index(bytes.len());
        prop_assert_eq!(read(&bytes[..cut], "a.wal").1, runs[..whole(cut)].to_vec());
        let at = flip.index(bytes.len());
        bytes[at] ^= 1;
        prop_assert_eq!(read(&bytes, "a.wal").1, runs[..whole(at)].to_vec());
    }

    #[test]
    fn frames_round_trip_and_no_flip_opens(chunk: Vec<u8>, salt: [u8; 32], ordinal: u32, flip: prop::sample::Index) {
        let header = ObjectHeader::new(Kind::Pack, 3, salt);
        let key = FrameKey::new(&epoch_keys(), &SCOPE, &header).unwrap();
        let (codec, body) = compress(&chunk, 1);
        let mut frame = vec![0; FRAME_HEADER_LEN];
        frame.extend(body);
        key.seal(ordinal, codec, chunk.len() as u32, &mut frame);
        prop_assert_eq!(key.open(ordinal, &frame, "frame").unwrap(), chunk);
        let at = flip.index(frame.len());
        frame[at] ^= 1;
        prop_assert!(key.open(ordinal, &frame, "frame").is_err());
    }

    #[test]
    fn objects_round_trip_and_no_flip_opens(sections: Vec<(bool, Vec<u8>)>, context: String, flip: prop::sample::Index) {
        let keys = epoch_keys();
        let role = |meta: bool| if meta { KeyRole::Meta } else { KeyRole::Data };
        let mut writer = ObjectWriter::new(&keys, &SCOPE, Kind::WalSegment, [9; 32], &context);
        for (meta, plain) in &sections {
            writer.section(role(*meta), plain, 1).unwrap();
        }
        let bytes = writer.finish();
        let read = |bytes: &[u8], context: &str| -> fairvault_format::Result<Vec<Vec<u8>>> {
            let mut reader = ObjectReader::new(&keys, &SCOPE, Kind::WalSegment, bytes, context, "object")?;
            let mut out = Vec::new();
            for (meta, _) in &sections {
                out.extend(reader.section(role(*meta))?);
            }
            reader.end()?;
            Ok(out)
        };
        let plain: Vec<_> = sections.iter().map(|(_, p)| p.clone()).collect();
        prop_assert_eq!(read(&bytes, &context).unwrap(), plain);
        if !sections.is_empty() {
            let elsewhere = context.clone() + "x";
            prop_assert!(read(&bytes, &elsewhere).is_err());
            let mut bad = bytes.clone();
            let at = flip.index(bad.len());
            bad[at] ^= 4;
            prop_assert!(read(&bad, &context).is_err(), "flip at {}", at);
            prop_assert!(read(&bytes[..bytes.len() - 1], &context).is_err());
        }
    }

    #[test]
    fn runs_round_trip(ids: std::collections::BTreeSet<[u8; 32]>) {
        let keys = epoch_keys();
        let header = ObjectHeader::new(Kind::Pack, 3, [5; 32]);
        let run = IndexRun {
            packs: vec![PackRef { name: [6; 32], header }],
            entries: ids.iter().map(|&id| IndexEntry { id, pack: 0, ordinal: 1, offset: 2, stored_len: 3 }).collect(),
        };
        let sealed = seal_run(&keys, &SCOPE, [7; 32], run.clone()).unwrap();
        prop_assert_eq!(open_run(&keys, &SCOPE, &sealed, "run").unwrap(), run);
    }

    #[test]
    fn any_bytes_are_refused_without_a_panic(bytes: Vec<u8>) {
        let _ = ObjectHeader::decode(&bytes, "x");
        let _ = decode_chunk(bytes.clone(), "x");
        let _ = pack::Footer::decode(&bytes, bytes.len() as u64, "x");
        let _ = pack::open_pack(&epoch_keys(), &SCOPE, &bytes, "x");
        let _ = keys::decode_slot(&bytes, "x");
        let _ = Secret::from_text(&bytes);
        let _ = fairvault_format::repository::Repository::decode(&bytes);
    }

    #[test]
    fn any_name_is_refused_without_a_panic(name: String) {
        let _ = names::check_name("stanza name", &name);
        let _ = names::parse_wal_file(&name);
        let _ = names::parse_piece(&name);
        let _ = names::parse_snapshot(&name);
    }
}

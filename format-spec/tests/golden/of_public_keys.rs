//! Objects that are sealed to a public key.

use super::*;

/// Keys of an epoch with a public key for content.
fn public_epoch_keys() -> EpochKeys {
    EpochKeys {
        data_key: None,
        data_private_key: Some([6; 32]),
        ..epoch_keys()
    }
}

/// What a host has of them that writes only: no secret from which anything opens that was sealed.
#[test]
fn write_only_slot() {
    let (keys, secret) = (public_epoch_keys(), Secret::Key([9; 32]));
    let seal = |keys: &EpochKeys, name: &str, salt| {
        keys::seal_slot(&SCOPE, keys, name, Some(&secret), keys::default_argon2(), salt, 7).unwrap()
    };
    let stored = vector("slot-write-only", &seal(&keys.write_only(), "host", [20; 32]));
    let slot = keys::decode_slot(&stored, "vector").unwrap();
    assert!(slot.write_only);
    let opened = keys::open_slot(&slot, Some(&secret), "vector").unwrap();
    assert!(!opened.can_read() && opened.has_public_key());
    let bundle = opened.to_bundle();
    let mut expected = keys.to_bundle();
    // Nothing of the bundle but what a writer needs; and no private half hides in another field.
    expected.data_private_key.clear();
    expected.operator_seed.clear();
    assert_eq!(bundle, expected);
    let whole = opened.encode().to_vec();
    for private in [[6u8; 32], [5; 32]] {
        assert!(!whole.windows(32).any(|part| part == private), "a private key is in it");
    }
    let full = vector("slot-public-key-epoch", &seal(&keys, "main", [21; 32]));
    let slot = keys::decode_slot(&full, "vector").unwrap();
    assert!(!slot.write_only);
    let opened = keys::open_slot(&slot, Some(&secret), "vector").unwrap();
    assert!(opened.can_read());
    assert_eq!(opened.encode(), keys.encode());
    // What it says of itself is authenticated.
    let mut claimed = slot.clone();
    claimed.write_only = true;
    assert!(keys::open_slot(&claimed, Some(&secret), "vector").is_err());
}

/// What a host has of them that says what an operator says: all but what opens content.
#[test]
fn slot_without_content() {
    for keys in [epoch_keys(), public_epoch_keys()] {
        let opened = keys.without_content();
        assert!(!opened.can_read() && opened.has_public_key() == keys.has_public_key());
        let mut expected = keys.to_bundle();
        expected.data_key.clear();
        expected.data_private_key.clear();
        assert_eq!(opened.to_bundle(), expected);
        assert!(!expected.operator_seed.is_empty());
    }
}

#[test]
fn pack_for_a_public_key() {
    let (keys, plain) = (public_epoch_keys(), b"hello, vault".to_vec());
    let host = keys.write_only();
    let fresh = Fresh::new([22; 32], [23; 32]);
    let (header, key) = FrameKey::of_new_pack(&host, &SCOPE, fresh).unwrap();
    let mut buffer = vec![0u8; FRAME_HEADER_LEN];
    buffer.extend_from_slice(&plain);
    key.seal(0, codec::RAW, plain.len() as u32, &mut buffer);
    let entry = DirectoryEntry {
        id: keys.chunk_id(&plain),
        stored_len: buffer.len() as u32,
        plain_len: plain.len() as u32,
    };
    let mut made = header.encode().to_vec();
    made.extend_from_slice(&buffer);
    made.extend_from_slice(&seal_tail(&host, &SCOPE, &header, &[entry]).unwrap());
    let stored = vector("pack-public-key", &made);
    assert_eq!(stored, made, "the same randomness makes the same object");
    assert_eq!(stored[12], 1);
    // The host reads the directory, which is metadata, and not the frame.
    let (found, entries) = open_pack(&host, &SCOPE, &stored, "vector").unwrap();
    assert_eq!((found, &entries), (header, &vec![entry]));
    let refused = FrameKey::new(&host, &SCOPE, &found).map(|_| ()).unwrap_err();
    assert!(matches!(refused, FormatError::WriteOnly { .. }), "{refused}");
    let frame = &stored[HEADER_LEN..HEADER_LEN + entry.stored_len as usize];
    let opened = FrameKey::new(&keys, &SCOPE, &found).unwrap().open(0, frame, "vector");
    assert_eq!(opened.unwrap(), plain);
    // Another private key opens nothing, and nobody takes a symmetric object for one of this epoch.
    let stranger = EpochKeys {
        data_private_key: Some([60; 32]),
        ..public_epoch_keys()
    };
    let opened = FrameKey::new(&stranger, &SCOPE, &found)
        .unwrap()
        .open(0, frame, "vector");
    assert!(matches!(opened, Err(FormatError::DoesNotOpen { .. })));
    let symmetric = ObjectHeader::new(Kind::Pack, 1, [22; 32]);
    assert!(FrameKey::new(&keys, &SCOPE, &symmetric).is_err());
    // Without randomness of its own, nothing is sealed to a public key.
    assert!(FrameKey::of_new_pack(&host, &SCOPE, [22; 32]).is_err());
}

#[test]
fn wal_for_a_public_key() {
    let keys = public_epoch_keys();
    let host = keys.write_only();
    let context = names::wal_file(0x1234, 2, "00000002.history", 1);
    let content = b"1\t0/5000000\tno recovery target specified\n".to_vec();
    let header = proto::WalHeader {
        name: "00000002.history".into(),
        timeline: 2,
        history: content.clone(),
        ..Default::default()
    };
    let fresh = Fresh::new([24; 32], [25; 32]);
    let made = wal::seal_wal(&host, &SCOPE, Kind::WalSide, fresh, &context, header, &content, 3).unwrap();
    let stored = vector("wal-public-key", &made);
    assert_eq!(stored[12], 1);
    let found = wal::open_header(&host, &SCOPE, Kind::WalSide, &stored, &context).unwrap();
    assert_eq!(
        (found.history, found.content_id),
        (content.clone(), host.chunk_id(&content).to_vec())
    );
    let refused = wal::open_wal(&host, &SCOPE, Kind::WalSide, &stored, &context).unwrap_err();
    assert!(matches!(refused, FormatError::WriteOnly { .. }), "{refused}");
    let (_, plain) = wal::open_wal(&keys, &SCOPE, Kind::WalSide, &stored, &context).unwrap();
    assert_eq!(plain, content);
}

#[test]
fn root_for_a_public_key() {
    let keys = public_epoch_keys();
    let root = proto::Root {
        info: Some(proto::BackupInfo {
            id: "20260101-000000F".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let usage = proto::Usage {
        packs: vec![6; 32],
        live_bytes: vec![50],
    };
    let host = keys.write_only();
    let fresh = Fresh::new([26; 32], [27; 32]);
    let mut writer = ObjectWriter::with_data(&host, &SCOPE, Kind::Root, fresh, "").unwrap();
    writer.message(KeyRole::Meta, &usage).unwrap();
    writer.message(KeyRole::Data, &root).unwrap();
    let stored = vector("root-public-key", &writer.finish());
    let mut reader = ObjectReader::new(&host, &SCOPE, Kind::Root, &stored, "", "vector").unwrap();
    assert_eq!(reader.message::<proto::Usage>(KeyRole::Meta).unwrap(), usage);
    let refused = reader.message::<proto::Root>(KeyRole::Data).unwrap_err();
    assert!(matches!(refused, FormatError::WriteOnly { .. }), "{refused}");
    let mut reader = ObjectReader::new(&keys, &SCOPE, Kind::Root, &stored, "", "vector").unwrap();
    reader.section(KeyRole::Meta).unwrap();
    assert_eq!(reader.message::<proto::Root>(KeyRole::Data).unwrap(), root);
}

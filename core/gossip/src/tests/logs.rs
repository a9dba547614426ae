//! Limits of a log, and what a snapshot brings back.

use super::{RECEIPT, at, cluster, node, row, stream, writer};
use crate::catalogue::Catalogue;
use crate::log::Refusal;
use crate::*;

#[test]
fn a_log_has_no_more_rows_than_a_reader_can_read_back() {
    let host = writer("host/a", 1, ("fra", Scope::Region));
    let rows: Vec<Row> = (0..=MAX_ROWS).map(|n| Row::tombstone(Key::new(n.to_le_bytes()).unwrap(), 5)).collect();
    let refused = Log::begin(host.certificate.clone(), host.head(5, &[]), rows, RECEIPT).err();
    assert_eq!(refused, Some(Refusal::TooBig));
}

#[test]
fn a_log_that_cannot_be_read_costs_a_snapshot_only_itself() {
    let writers = ["host/a", "host/b", "host/c"].map(|name| writer(name, 1, ("fra", Scope::Region)));
    let mut catalogue = Catalogue::new(cluster().verifying_key());
    let rows = [row("k", 3, b"v")];
    writers.iter().for_each(|writer| drop(catalogue.take(writer.whole(3, &rows), RECEIPT)));
    let mut bytes = crate::snapshot::encode(7, &[], &catalogue);
    let mut record = vec![];
    writers[0].whole(3, &rows).write(&mut record);
    let at = bytes.windows(record.len()).position(|window| window == record).unwrap();
    bytes[at + record.len() - 1] = 9; // no kind of part
    let body = bytes.len() - 32;
    let sum = *blake3::hash(&bytes[..body]).as_bytes();
    bytes[body..].copy_from_slice(&sum);
    let snapshot = Snapshot::decode(cluster().verifying_key(), &bytes).unwrap();
    let held: Vec<bool> = writers.iter().map(|writer| snapshot.catalogue.log(writer.certificate.id).is_some()).collect();
    assert_eq!((held, snapshot.refused), (vec![false, true, true], 1));
}

#[test]
fn a_quarantined_log_is_readable_after_a_restart_too() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let (id, rows) = (host.certificate.id, [row("k", 3, b"v")]);
    for rows in [&rows[..], &[]] {
        node.handle(stream("x", &Message::Batches(vec![host.whole(3, rows)])), at(1));
    }
    assert!(node.catalogue().fork(id).is_some());
    let mut snapshot = Snapshot::decode(cluster().verifying_key(), &node.snapshot()).unwrap();
    assert_eq!((snapshot.refused, snapshot.catalogue.log(id).map(Log::len)), (0, Some(1)));
    assert!(snapshot.catalogue.fork(id).is_some());
    assert!(matches!(snapshot.catalogue.take(host.whole(4, &[]), RECEIPT), Taken::Known), "and still quarantined");
}

#[test]
fn many_small_rows_count_as_what_they_take() {
    let host = writer("host/a", 1, ("fra", Scope::Region));
    let rows: Vec<Row> = (0..MAX_ROWS - 10_000).map(|n| row(&n.to_string(), 5, &[0; 80])).collect();
    let bytes: usize = rows.iter().map(Row::length).sum();
    assert!(bytes < MAX_LOG_BYTES / 2);
    let refused = Log::begin(host.certificate.clone(), host.head(5, &[]), rows, RECEIPT).err();
    assert_eq!(refused, Some(Refusal::TooBig));
}

#[test]
fn a_key_of_any_length_is_found_in_its_row() {
    for length in 0..=128 {
        let key = "k".repeat(length);
        for row in [row(&key, u64::MAX, b"value"), Row::tombstone(Key::new(&key).unwrap(), 7)] {
            let mut bytes = vec![];
            row.write(&mut bytes);
            let read = Row::read(&mut crate::wire::Reader::new(&bytes)).unwrap();
            assert_eq!((read.key(), read.seq(), read.is_dead()), (key.as_bytes(), row.seq(), row.is_dead()));
        }
    }
}

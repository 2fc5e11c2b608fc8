//! The event files of `still linearize`, read back by a decoder that shares nothing with the writer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::common::{Outcome, linearize_args, still, teacher_dir, words};

/// CRC-32C as it is defined, bit by bit, and masked as the record format asks.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The payloads of a file of records: length, its checksum, payload, its checksum.
fn records(bytes: &[u8]) -> Vec<&[u8]> {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut records = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!(word(at + 8), masked_crc32c(&bytes[at..at + 8]), "checksum of a length");
        let payload = &bytes[at + 12..at + 12 + length];
        assert_eq!(word(at + 12 + length), masked_crc32c(payload), "checksum of a record");
        records.push(payload);
        at += 12 + length + 4;
    }
    records
}

/// A field of a protobuf message.
enum Field<'a> {
    Varint(u64),
    Fixed([u8; 8]),
    Float(f32),
    Bytes(&'a [u8]),
}

fn fields(mut message: &[u8]) -> BTreeMap<u64, Field<'_>> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let length = bytes.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
        let (digits, rest) = bytes.split_at(length);
        *bytes = rest;
        digits.iter().rev().fold(0, |value, digit| (value << 7) | u64::from(digit & 0x7f))
    }
    let mut fields = BTreeMap::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let mut take = |length: usize| {
            let (taken, rest) = message.split_at(length);
            message = rest;
            taken
        };
        let field = match key & 7 {
            1 => Field::Fixed(take(8).try_into().unwrap()),
            5 => Field::Float(f32::from_le_bytes(take(4).try_into().unwrap())),
            0 => Field::Varint(varint(&mut message)),
            2 => {
                let length = varint(&mut message) as usize;
                let (bytes, rest) = message.split_at(length);
                message = rest;
                Field::Bytes(bytes)
            }
            wire => panic!("wire type {wire}"),
        };
        fields.insert(key >> 3, field);
    }
    fields
}

/// Tag → (step, value) in the order of the files' names, as readers take them.
fn scalars(dir: &Path) -> BTreeMap<String, Vec<(u64, f32)>> {
    let mut paths: Vec<_> = dir.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut scalars: BTreeMap<String, Vec<(u64, f32)>> = BTreeMap::new();
    for path in paths {
        assert!(path.file_name().unwrap().to_str().unwrap().contains("tfevents"));
        for (n, record) in records(&fs::read(path).unwrap()).into_iter().enumerate() {
            let event = fields(record);
            let Field::Fixed(time) = event[&1] else { panic!("no time") };
            assert!(f64::from_le_bytes(time) > 1.7e9);
            if n == 0 {
                assert!(matches!(event[&3], Field::Bytes(b"brain.Event:2")));
                continue;
            }
            let step = match event.get(&2) {
                Some(Field::Varint(step)) => *step,
                _ => 0,
            };
            let Field::Bytes(summary) = event[&5] else { panic!("no summary") };
            let Field::Bytes(value) = fields(summary)[&1] else { panic!("no value") };
            let value = fields(value);
            let (Field::Bytes(tag), Field::Float(number)) = (&value[&1], &value[&2]) else {
                panic!("no scalar")
            };
            let tag = String::from_utf8(tag.to_vec()).unwrap();
            scalars.entry(tag).or_default().push((step, *number));
        }
    }
    scalars
}

fn metrics(run: &Path, stage: &str) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["stage"] == stage).collect()
}

/// Every scalar of the log is in the event files, once, and nothing else but the speed.
fn assert_same(run: &Path, stage: &str) {
    let mut scalars = scalars(&run.join("tensorboard").join(stage));
    let metrics = metrics(run, stage);
    let mut check = |tag: &str, value: &dyn Fn(&serde_json::Value) -> f64| {
        let expected: Vec<(u64, f32)> = metrics
            .iter()
            .map(|line| (line["step"].as_u64().unwrap(), value(line) as f32))
            .collect();
        assert_eq!(scalars.remove(tag).unwrap_or_default(), expected, "{stage}: {tag}");
    };
    for (tag, key) in [("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "grad_norm")]
    {
        check(tag, &|line| line[key].as_f64().unwrap());
    }
    let layers = metrics[0]["layer_losses"].as_array().map_or(0, Vec::len);
    for layer in 0..layers {
        check(&format!("layer_loss/{layer:02}"), &|line| {
            line["layer_losses"][layer].as_f64().unwrap()
        });
    }
    let speed = scalars.remove("train/tokens_per_s").unwrap();
    assert_eq!(speed.len(), metrics.len());
    assert!(speed.iter().all(|(_, speed)| speed.is_finite() && *speed > 0.0));
    assert!(scalars.is_empty(), "also there: {:?}", scalars.keys());
}

fn linearize(dir: &Path, extra: &[&str]) -> Outcome {
    let data = dir.join("data.txt");
    fs::write(&data, words(2000)).unwrap();
    let short = ["data.length=128", "transfer.steps=5", "finetune.steps=3", "checkpoint.every=2"];
    Outcome::of(
        still()
            .args(linearize_args(teacher_dir(), &data, &dir.join("student")))
            .args(short.iter().flat_map(|value| ["--set", value]))
            .args(extra),
    )
}

#[test]
fn event_files_say_what_the_log_says() {
    let dir = tempfile::tempdir().unwrap();
    linearize(dir.path(), &[]).succeeded();
    let run = dir.path().join("student.run");
    assert_same(&run, "transfer");
    assert_same(&run, "finetune");
}

/// A kill after a checkpoint: the steps behind it are done again, and must not be there twice.
#[test]
fn a_resumed_run_tells_no_step_twice() {
    let dir = tempfile::tempdir().unwrap();
    linearize(dir.path(), &[]).succeeded();
    let run = dir.path().join("student.run");
    fs::remove_dir_all(run.join("checkpoints/finetune-step-000003")).unwrap();
    linearize(dir.path(), &["--resume", "--overwrite"]).succeeded();
    assert_same(&run, "transfer");
    assert_same(&run, "finetune");
    let files = run.join("tensorboard/finetune").read_dir().unwrap().count();
    assert_eq!(files, 2, "one up to the checkpoint, one from there");
}

#[test]
fn no_event_files_if_not_wanted() {
    let dir = tempfile::tempdir().unwrap();
    linearize(dir.path(), &["--no-tensorboard"]).succeeded();
    assert!(!dir.path().join("student.run/tensorboard").exists());
}

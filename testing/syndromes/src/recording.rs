//! The file of recorded exits.

use std::fmt::Write as _;

use anyhow::ensure;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::cases::{Case, Page};

/// What stage 2 does not permit on a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Permission {
    Write,
    Execute,
    All,
}

/// An exit that permissions resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Exit {
    #[serde(serialize_with = "hex", deserialize_with = "from_hex")]
    pub syndrome: u64,
    #[serde(serialize_with = "hex", deserialize_with = "from_hex")]
    pub virtual_address: u64,
    #[serde(serialize_with = "hex", deserialize_with = "from_hex")]
    pub guest_physical_page: u64,
    pub page: Page,
    pub lacks: Permission,
}

/// The exits of a case, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub case: Case,
    pub exits: Vec<Exit>,
    /// The pages whose contents are others after the case.
    pub changed: Vec<Page>,
}

/// The file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recording {
    pub description: Vec<String>,
    pub qemu: String,
    pub records: Vec<Record>,
}

const DESCRIPTION: [&str; 12] = [
    "How an emulated arm64 processor reports accesses of a guest that stage 2 denies.",
    "Written by `cargo run -p syndromes -- --write`, and compared with a new recording by `cargo xtask prove syndromes`.",
    "Each case executes one instruction with the address of `page` in x0, or a loop around it.",
    "With `walk`, an `entry` of stage 1 in the page `table` translates the address. TCR_EL1.HA and HD are set.",
    "At each exit, the host permits what the page `lacks`, and resumes the guest. All cases then ended.",
    "At a read of an unmapped page, the host permits reading and executing. Otherwise it permits all accesses.",
    "`syndrome` is ESR_EL2, `virtual_address` FAR_EL2, and `guest_physical_page` the page of 16 KiB of HPFAR_EL2.",
    "`changed` lists the pages whose contents the case changed.",
    "`str x4, [x0, #-4]` also writes the end of the page before `page`.",
    "QEMU executes maintenance of data caches, `ic ivau` and `prfm` without an access.",
    "The processor reports an atomic update as a read if the page can't be read.",
    "In a fault of a walk, QEMU reports the level of the walk in place of that of stage 2.",
];

impl Recording {
    pub(crate) fn new(qemu: String, records: Vec<Record>) -> Self {
        Self {
            description: DESCRIPTION.map(str::to_owned).to_vec(),
            qemu,
            records,
        }
    }

    /// Returns the text of the file, with a line for each record.
    pub(crate) fn text(&self) -> anyhow::Result<String> {
        let description = serde_json::to_string_pretty(&self.description)?;
        let description = description.replace('\n', "\n  ");
        let qemu = serde_json::to_string(&self.qemu)?;
        let mut text = format!(
            "{{\n  \"description\": {description},\n  \"qemu\": {qemu},\n  \"records\": [\n"
        );
        for (number, record) in self.records.iter().enumerate() {
            let comma = if number + 1 < self.records.len() {
                ","
            } else {
                ""
            };
            let _ = writeln!(text, "    {}{comma}", serde_json::to_string(record)?);
        }
        text.push_str("  ]\n}\n");
        Ok(text)
    }

    /// Fails if the records of `golden` differ.
    pub(crate) fn compare(&self, golden: &Self) -> anyhow::Result<()> {
        let mut differences = String::new();
        for record in &self.records {
            let same = golden.records.iter().find(|old| old.case == record.case);
            if same != Some(record) {
                let _ = writeln!(differences, "recorded: {same:?}\n     now: {record:?}");
            }
        }
        ensure!(
            differences.is_empty() && self.records.len() == golden.records.len(),
            "the exits differ from those that were recorded with {:?}, now with {:?}; {} cases were \
             recorded, now {}:\n{differences}",
            golden.qemu,
            self.qemu,
            golden.records.len(),
            self.records.len()
        );
        Ok(())
    }
}

fn hex<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

fn from_hex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let digits = text.strip_prefix("0x").unwrap_or(&text);
    u64::from_str_radix(digits, 16).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    fn recording() -> Recording {
        let records = cases::all().into_iter().map(|case| Record {
            case,
            exits: vec![Exit {
                syndrome: 0x9200_004f,
                virtual_address: 0x4042_0000,
                guest_physical_page: 0x4042_0000,
                page: Page::ProtectedData,
                lacks: Permission::Write,
            }],
            changed: vec![Page::ProtectedData],
        });
        Recording::new("QEMU".into(), records.collect())
    }

    #[test]
    fn a_recording_is_read_as_it_was_written() {
        let recording = recording();
        let read: Recording = serde_json::from_str(&recording.text().unwrap()).unwrap();
        assert_eq!(read, recording);
        recording.compare(&read).unwrap();
    }

    #[test]
    fn a_changed_and_a_missing_record_are_differences() {
        let (golden, mut changed) = (recording(), recording());
        changed.records[3].exits[0].syndrome = 7;
        let error = changed.compare(&golden).unwrap_err().to_string();
        assert!(error.contains("syndrome: 7"), "{error}");
        let mut missing = recording();
        missing.records.pop();
        missing.compare(&golden).unwrap_err();
    }
}

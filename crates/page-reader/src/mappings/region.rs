//! One mapping of a process: a line of `/proc/<pid>/maps`.

use std::fmt;
use std::ops::Range;

/// A range of addresses that a process has mapped.
///
/// A region is a line of `/proc/<pid>/maps`.
///
/// [`Display`](fmt::Display) writes one line without control characters, even if the name has some.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessRegion {
    /// The addresses in the process. Regions are not empty and do not overlap.
    pub addresses: Range<u64>,
    /// The access that the process has.
    pub permissions: Permissions,
    /// The position of the first byte in the file, in bytes; 0 without a file.
    pub offset: u64,
    /// The major and minor number of the file's device; both 0 without a file.
    pub device: (u32, u32),
    /// The inode number of the file; 0 without a file.
    pub inode: u64,
    /// The name as written by the kernel, possibly not UTF-8: a path, `/memfd:ram (deleted)`,
    /// `[heap]`, or empty for most anonymous memory. A line feed is written as `\012`, any other
    /// byte as itself.
    pub name: Vec<u8>,
}

/// The access that a process has to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// The process may read.
    pub read: bool,
    /// The process may write.
    pub write: bool,
    /// The process may execute.
    pub execute: bool,
    /// Writes are visible to all users of the file. If `false`, the process has its own copy.
    pub shared: bool,
}

impl ProcessRegion {
    /// Parses a line of `/proc/<pid>/maps` without its line feed:
    /// `start-end perms offset major:minor inode   name`. From
    /// `Documentation/filesystems/proc.rst`.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let mut field = || str::from_utf8(fields.next()?).ok();
        let hex = |digits: &str| {
            let all_digits = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            u64::from_str_radix(digits, 16).ok().filter(|_| all_digits)
        };
        let (start, end) = field()?.split_once('-')?;
        let addresses = hex(start)?..hex(end)?;
        let permissions = Permissions::parse(field()?)?;
        let offset = hex(field()?)?;
        let (major, minor) = field()?.split_once(':')?;
        let device = (hex(major)?.try_into().ok()?, hex(minor)?.try_into().ok()?);
        let inode = field()?;
        let inode = inode.parse().ok().filter(|_| !inode.starts_with('+'))?;
        let name = fields.next().unwrap_or_default();
        let padding = name.iter().take_while(|byte| **byte == b' ').count();
        (!addresses.is_empty()).then(|| Self {
            addresses,
            permissions,
            offset,
            device,
            inode,
            name: name[padding..].to_vec(),
        })
    }

    /// Returns the size of the region in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }
}

impl Permissions {
    fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; 4] = text.as_bytes().try_into().ok()?;
        let one_of = |index: usize, set, unset| match bytes[index] {
            byte if byte == set => Some(true),
            byte if byte == unset => Some(false),
            _ => None,
        };
        Some(Self {
            read: one_of(0, b'r', b'-')?,
            write: one_of(1, b'w', b'-')?,
            execute: one_of(2, b'x', b'-')?,
            shared: one_of(3, b's', b'p')?,
        })
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |set, letter| if set { letter } else { '-' };
        let (read, write) = (letter(self.read, 'r'), letter(self.write, 'w'));
        let execute = letter(self.execute, 'x');
        let shared = if self.shared { 's' } else { 'p' };
        write!(f, "{read}{write}{execute}{shared}")
    }
}

impl fmt::Display for ProcessRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.addresses;
        let (permissions, kib) = (self.permissions, self.size() >> 10);
        write!(f, "{start:#x}-{end:#x} {permissions} {kib} KiB")?;
        if self.inode != 0 {
            write!(f, " from offset {:#x} of", self.offset)?;
        }
        match &self.name[..] {
            [] => f.write_str(" (no name)"),
            name => write!(f, " {}", printable(name)),
        }
    }
}

/// Returns the text of bytes that another process chose, such as a name, for a terminal: control
/// characters are escaped.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let mut printable = String::new();
    for char in String::from_utf8_lossy(bytes).chars() {
        match char {
            '\\' | '"' | '\'' => printable.push(char),
            _ => printable.extend(char.escape_debug()),
        }
    }
    printable
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_field_of_a_line_is_parsed() {
        let line = b"7f00d0000000-7f00d0002000 r--p 00001000 fe:00 4711          /a b\\012c/vm.img";
        let image = ProcessRegion::parse(line).unwrap();
        let expected = ProcessRegion {
            addresses: 0x7f00_d000_0000..0x7f00_d000_2000,
            permissions: Permissions {
                read: true,
                write: false,
                execute: false,
                shared: false,
            },
            offset: 0x1000,
            device: (0xfe, 0),
            inode: 4711,
            name: b"/a b\\012c/vm.img".to_vec(),
        };
        assert_eq!(image, expected);
        assert_eq!(
            image.to_string(),
            "0x7f00d0000000-0x7f00d0002000 r--p 8 KiB from offset 0x1000 of /a b\\012c/vm.img"
        );
        let guard = ProcessRegion::parse(b"7f0040000000-7f0040001000 ---p 00000000 00:00 0 ");
        assert_eq!(
            guard.unwrap().to_string(),
            "0x7f0040000000-0x7f0040001000 ---p 4 KiB (no name)"
        );
    }

    #[test]
    fn control_characters_in_names_are_escaped() {
        let name = b"/memfd:\x1b]0;\x07\r\x7f\xff\xc2\x9b\xe2\x80\xae'\\\"";
        let line = [b"1000-2000 rw-s 00000000 00:01 5     ", &name[..]].concat();
        let region = ProcessRegion::parse(&line).unwrap();
        assert_eq!(region.name, name);
        assert_eq!(
            region.to_string(),
            "0x1000-0x2000 rw-s 4 KiB from offset 0x0 of \
             /memfd:\\u{1b}]0;\\u{7}\\r\\u{7f}\u{fffd}\\u{9b}\\u{202e}'\\\""
        );
    }

    proptest! {
        #[test]
        fn a_formatted_region_is_parsed_unchanged(
            start in 0..u64::MAX / 2, size in 1..u64::MAX / 2, offset: u64,
            major: u32, minor: u32, inode: u64,
            flags: [bool; 4], name in "(/[^\n]{0,20})?",
        ) {
            let [read, write, execute, shared] = flags;
            let region = ProcessRegion {
                addresses: start..start + size,
                permissions: Permissions { read, write, execute, shared },
                offset,
                device: (major, minor),
                inode,
                name: name.clone().into_bytes(),
            };
            let permissions = region.permissions;
            let line = format!(
                "{start:08x}-{:08x} {permissions} {offset:08x} {major:02x}:{minor:02x} \
                 {inode}    {name}",
                start + size
            );
            prop_assert_eq!(ProcessRegion::parse(line.as_bytes()), Some(region));
        }
    }
}

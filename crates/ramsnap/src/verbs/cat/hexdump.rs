//! Bytes as text.

use std::fmt::Write as _;

/// The bytes of a line.
const LINE: usize = 16;

/// Lines of 16 bytes with their addresses.
#[derive(Debug)]
pub(super) struct Hexdump {
    address: u64,
    /// The line before.
    last: Option<[u8; LINE]>,
    skipping: bool,
}

impl Hexdump {
    /// Begins at `address`.
    pub(super) fn new(address: u64) -> Self {
        Self {
            address,
            last: None,
            skipping: false,
        }
    }

    /// Returns the lines of the next bytes. Only the last call may have a number of bytes that is
    /// not whole lines.
    pub(super) fn lines(&mut self, bytes: &[u8]) -> String {
        let mut text = String::new();
        for line in bytes.chunks(LINE) {
            let whole = <[u8; LINE]>::try_from(line).ok();
            if whole.is_some() && whole == self.last {
                if !self.skipping {
                    text.push_str("*\n");
                }
                self.skipping = true;
            } else {
                self.skipping = false;
                self.line(line, &mut text);
            }
            self.last = whole;
            self.address += line.len() as u64;
        }
        text
    }

    fn line(&self, line: &[u8], text: &mut String) {
        let _ = write!(text, "{:016x} ", self.address);
        for at in 0..LINE {
            let gap = if at % 8 == 0 { " " } else { "" };
            let _ = match line.get(at) {
                Some(byte) => write!(text, "{gap}{byte:02x} "),
                None => write!(text, "{gap}   "),
            };
        }
        let shown = line.iter().map(|byte| match byte {
            0x20..=0x7e => char::from(*byte),
            _ => '.',
        });
        text.push_str(" |");
        text.extend(shown);
        text.push_str("|\n");
    }

    /// Returns the last line: the address after the last byte.
    pub(super) fn end(&self) -> String {
        format!("{:016x}", self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_addresses_bytes_and_text() {
        let mut dump = Hexdump::new(0x1000);
        let mut bytes = b"RAM of a guest.\n".to_vec();
        bytes.extend([0; 48]);
        bytes.extend([0xff, 0x41]);
        assert_eq!(
            dump.lines(&bytes),
            "0000000000001000  52 41 4d 20 6f 66 20 61  20 67 75 65 73 74 2e 0a  |RAM of a guest..|\n\
             0000000000001010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n\
             *\n\
             0000000000001040  ff 41                                             |.A|\n"
        );
        assert_eq!(dump.end(), "0000000000001042");
    }

    #[test]
    fn equal_lines_of_several_pieces_are_one_mark() {
        let mut dump = Hexdump::new(0);
        let lines = [dump.lines(&[7; 32]), dump.lines(&[7; 32])].concat();
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(lines.ends_with("*\n"), "{lines}");
    }
}

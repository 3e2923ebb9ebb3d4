//! Numbers in the texts of errors: none reads "1 bytes" or "1 regions".

use std::sync::LazyLock;

use regex::Regex;

/// The tool. The lengths in its errors are those of images, which have many bytes.
const TOOL: &str = "crates/ramsnap/";

/// A counted thing in the plural, after a placeholder. A length may be that of one byte.
const COUNTED: &str = r"\{\w*\} (?:RAM |memory |host |mapped )?(?:vCPUs|regions|slots|mappings|ranges|checksums|chunks|addresses|pages|images|files|runs|processes|threads|places)\b";
const LENGTH: &str = r"\{len\} bytes\b";

/// Returns the lines of texts that have a plural after a number that may be 1.
pub(crate) fn after_numbers(path: &str, text: &str) -> Vec<usize> {
    static FOUND: LazyLock<[Regex; 2]> = LazyLock::new(|| {
        [COUNTED, LENGTH].map(|pattern| Regex::new(pattern).expect("a valid pattern"))
    });
    if !path.starts_with("crates/") || !path.contains("/src/") {
        return Vec::new();
    }
    let [counted, length] = &*FOUND;
    let in_tool = path.starts_with(TOOL);
    let mut in_attribute = false;
    let lines = text.lines().enumerate().filter(|(_, line)| {
        in_attribute |= line.trim_start().starts_with("#[error(");
        let breaks =
            in_attribute && (counted.is_match(line) || (!in_tool && length.is_match(line)));
        in_attribute &= !line.trim_end().ends_with(")]");
        breaks
    });
    lines.map(|(line, _)| line + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "crates/some/src/error.rs";

    #[test]
    fn a_plural_after_a_number_is_found() {
        for (text, found) in [
            ("#[error(\"{running} vCPUs are running\")]", 1),
            ("#[error(\n    \"pass {given} memory slots\"\n)]", 2),
            ("\n#[error(\"read of {len} bytes\")]", 2),
        ] {
            assert_eq!(after_numbers(PATH, text), [found], "{text}");
        }
    }

    #[test]
    fn other_texts_are_accepted() {
        for text in [
            "#[error(\"vCPUs are running ({running})\")]",
            "#[error(\"pages of {page_size} bytes\")]",
            "#[error(\"failed\")]\nfn f() { println!(\"{len} bytes\") }",
        ] {
            assert_eq!(after_numbers(PATH, text), [0; 0], "{text}");
        }
        let text = "#[error(\"the {len} bytes of its image\")]";
        assert_eq!(after_numbers("crates/ramsnap/src/failure.rs", text), [0; 0]);
    }
}

//! The texts of errors: each contains the reason, because many programs log `{}` of an error and
//! not its sources.

use std::sync::LazyLock;

use regex::Regex;

/// The tool, which prints an error with all of its sources.
const TOOL: &str = "crates/ramsnap/";

/// Returns the lines of the errors whose text lacks that of their source.
pub(crate) fn without_reason(path: &str, text: &str) -> Vec<usize> {
    if !path.starts_with("crates/") || path.starts_with(TOOL) || !path.contains("/src/") {
        return Vec::new();
    }
    const ATTRIBUTE: &str = "#[error(";
    let starts = text.match_indices(ATTRIBUTE);
    let lacking = starts.filter(|(start, _)| {
        let attribute = up_to_closing(&text[start + ATTRIBUTE.len()..]);
        let item = &text[start + ATTRIBUTE.len() + attribute.len()..];
        let source = source_of(fields_after(item));
        source.is_some_and(|source| !prints(attribute, &source))
    });
    lacking
        .map(|(start, _)| text[..start].matches('\n').count() + 1)
        .collect()
}

/// Returns whether the arguments of an `error` attribute print this field.
fn prints(attribute: &str, source: &str) -> bool {
    let by_name = format!("{{{source}");
    let by_function = format!("reason({source}");
    attribute.trim() == "transparent"
        || attribute.contains(&by_name)
        || attribute.contains(&by_function)
}

/// Returns the text before the bracket that closes one opened before it. Brackets in strings do not
/// count.
fn up_to_closing(text: &str) -> &str {
    let (mut depth, mut quoted, mut escaped) = (1, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '(' | '{' if !quoted => depth += 1,
            ')' | '}' if !quoted => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &text[..at];
        }
    }
    text
}

/// Returns the fields of the variant or struct that follows an attribute: what is in its brackets.
fn fields_after(item: &str) -> &str {
    static NAME: LazyLock<Regex> = LazyLock::new(|| {
        let pattern =
            r"^\)\]\s*(?:///[^\n]*\s*|#\[[^\n]*\]\s*)*(?:pub )?(?:struct )?\w+(?:<[^>]*>)?\s*[({]";
        Regex::new(pattern).expect("a valid pattern")
    });
    NAME.find(item)
        .map_or("", |found| up_to_closing(&item[found.end()..]))
}

/// Returns the name of the field that is the source of an error.
fn source_of(fields: &str) -> Option<String> {
    static MARKED: LazyLock<Regex> = LazyLock::new(|| {
        let pattern = r"#\[(?:source|from)\]\s*(?:pub\s+)?(?:(\w+)\s*:\s)?";
        Regex::new(pattern).expect("a valid pattern")
    });
    static NAMED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\bsource\s*:\s").expect("a valid pattern"));
    if let Some(marked) = MARKED.captures(fields) {
        let name = marked.get(1).map_or("0", |name| name.as_str());
        return Some(name.to_owned());
    }
    NAMED.is_match(fields).then(|| "source".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "crates/some/src/error.rs";

    #[test]
    fn an_error_without_its_reason_is_found() {
        for variant in [
            "#[error(\"failed\")]\n    Io(#[from] io::Error),",
            "#[error(\"failed\")]\n    /// Why.\n    Io {\n        path: PathBuf,\n        source: io::Error,\n    },",
            "#[error(\"bad )] {}\", advice(source))]\n    Io { source: io::Error },",
            "#[error(\"failed\")]\n#[non_exhaustive]\npub struct Failed<E> {\n    #[source]\n    why: E,\n}",
        ] {
            assert_eq!(
                without_reason(PATH, &format!("\n{variant}\n")),
                [2],
                "{variant}"
            );
        }
    }

    #[test]
    fn an_error_with_its_reason_is_accepted() {
        for variant in [
            "#[error(transparent)]\n    Io(#[from] io::Error),",
            "#[error(\"failed: {0}\")]\n    Io(#[source] io::Error),",
            "#[error(\"failed: {source}\")]\n    Io { source: io::Error },",
            "#[error(\"failed{}\", reason(source.as_ref()))]\n    Io { source: Option<Other> },",
            "#[error(\"failed\")]\n    Failed { path: PathBuf },\n    Io(#[from] io::Error),",
            "#[error(\"failed\")]\n    Failed,",
        ] {
            assert_eq!(without_reason(PATH, variant), [0; 0], "{variant}");
        }
        let variant = "#[error(\"failed\")]\n    Io(#[from] io::Error),";
        assert_eq!(
            without_reason("crates/ramsnap/src/failure.rs", variant),
            [0; 0]
        );
    }
}

//! The option `--color`.

use clap::{ColorChoice, ValueEnum};

/// Whether output has colors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// In a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    Always,
    Never,
}

impl Color {
    /// Applies the choice to stdout and stderr.
    pub fn apply(self) {
        let colors = match self {
            Self::Auto => return,
            Self::Always => true,
            Self::Never => false,
        };
        console::set_colors_enabled(colors);
        console::set_colors_enabled_stderr(colors);
    }

    /// Returns the choice for messages about wrong usage, which are printed while the arguments are
    /// parsed.
    pub fn of_arguments() -> ColorChoice {
        let mut arguments = std::env::args_os().skip(1);
        while let Some(argument) = arguments.next() {
            let text = argument.to_string_lossy();
            let value = match text.strip_prefix("--color") {
                Some("") => arguments.next().unwrap_or_default(),
                Some(value) => value.trim_start_matches('=').into(),
                None => continue,
            };
            return match value.to_str() {
                Some("always") => ColorChoice::Always,
                Some("never") => ColorChoice::Never,
                _ => ColorChoice::Auto,
            };
        }
        ColorChoice::Auto
    }
}

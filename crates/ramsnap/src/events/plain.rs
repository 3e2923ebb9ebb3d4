//! Events as plain lines: `ramsnap: file staged (dest: "/x", recycled: false)`.

use std::fmt::{self, Debug};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Formats an event without its time, level and module.
pub(super) struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut parts = Parts::default();
        event.record(&mut parts);
        let fields = match parts.fields.is_empty() {
            true => String::new(),
            false => format!(" ({})", parts.fields.join(", ")),
        };
        let line = format!("ramsnap: {}{fields}", parts.message);
        for character in line.chars() {
            match character.is_control() {
                true => write!(writer, "{}", character.escape_debug())?,
                false => writer.write_char(character)?,
            }
        }
        writeln!(writer)
    }
}

#[derive(Default)]
struct Parts {
    message: String,
    fields: Vec<String>,
}

impl Visit for Parts {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => self
                .fields
                .push(format!("{}: {value:?}", name.replace('_', " "))),
        }
    }
}

//! How numbers and tables look.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// Cells of a bar.
const BAR: usize = 24;

/// Which side a column's text stands on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

/// A table, its columns as wide as they must be.
pub fn table(columns: &[(&str, Side)], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default().max(columns[column].0.chars().count())
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |cells: &[&str]| {
        let cell = |(column, text): (usize, &&str)| match columns[column].1 {
            Side::Left => format!("{text:<width$}", width = widths[column]),
            Side::Right => format!("{text:>width$}", width = widths[column]),
        };
        let line = cells.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ");
        format!("{}\n", line.trim_end())
    };
    let head: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    let mut text = line(&head);
    for row in rows {
        text += &line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    text
}

/// `████░░░░  50 %`
pub fn bar(part: u64, whole: u64) -> String {
    let share = if whole == 0 { 0.0 } else { (part as f64 / whole as f64).min(1.0) };
    let full = (share * BAR as f64).round() as usize;
    format!("{}{} {:3.0} %", "█".repeat(full), "░".repeat(BAR - full), share * 100.0)
}

/// Bytes, three digits and a unit.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// `1,234,567`
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A span of time in its largest unit: `3 h`.
pub fn span(ms: u64) -> String {
    let units = [("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)];
    let unit = units.into_iter().find(|(_, unit)| ms >= 2 * unit);
    unit.map_or_else(|| format!("{ms} ms"), |(name, unit)| format!("{} {name}", ms / unit))
}

/// Since then, or until then: `3 h ago`, `in 3 h`.
pub fn when(at_ms: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64);
    if at_ms > now {
        format!("in {}", span(at_ms - now))
    } else {
        format!("{} ago", span(now - at_ms))
    }
}

/// A number in an answer; 0 if it is not there.
pub fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

/// A text in an answer; empty if it is not there.
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub fn print_json(value: &Value) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(count(0), "0");
        assert_eq!(count(123_456), "123,456");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1 << 20), "1.0 MiB");
        assert_eq!(bytes(3 << 40), "3.0 TiB");
        assert_eq!(span(1500), "1500 ms");
        assert_eq!(span(7_200_000), "2 h");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a chat".to_owned(), "7".to_owned()], vec!["b".into(), "1,000".into()]];
        let table = table(&[("name", Side::Left), ("n", Side::Right)], &rows);
        assert_eq!(table, "name        n\na chat      7\nb       1,000\n");
    }

    #[test]
    fn a_bar_is_never_longer_than_full() {
        assert!(bar(9, 3).ends_with("100 %"));
        assert!(bar(0, 0).ends_with("  0 %"));
    }
}

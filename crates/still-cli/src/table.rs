//! Plain-text tables: the first column to the left, numbers to the right.

use still_attention::StateBytes;

/// Columns of a terminal that text without a terminal is made for.
pub const WIDTH: usize = 80;

/// Renders `rows` under `headers`, columns two spaces apart, with a rule below the headers.
pub fn render(headers: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headers[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headers.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (column, cell) in cells.enumerate() {
            // Not by a format's width, which is bounded: a cell may come from a file.
            let padding = " ".repeat(widths[column] - cell.chars().count());
            match column {
                0 => text.extend([cell, &padding]),
                _ => text.extend(["  ", &padding, cell]),
            }
        }
        text.trim_end().to_owned()
    };
    let rule = "-".repeat(widths.iter().sum::<usize>() + 2 * (headers.len().max(1) - 1));
    let mut lines = vec![line(&mut headers.iter().copied()), rule];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// Bytes with a binary unit: `1.5 MiB`.
pub fn bytes(bytes: usize) -> String {
    match unit_of(bytes) {
        0 => format!("{bytes} B"),
        unit => format!("{:.1} {}", bytes as f64 / size_of_unit(unit), UNITS[unit]),
    }
}

/// A part of bytes and all of them, in the unit of all: `0.2/1.5 MiB`.
pub fn bytes_of(part: usize, whole: usize) -> String {
    match unit_of(whole) {
        0 => format!("{part}/{whole} B"),
        unit => format!("{:.1}/{}", part as f64 / size_of_unit(unit), bytes(whole)),
    }
}

/// The largest unit that `bytes` have one of.
fn unit_of(bytes: usize) -> usize {
    (1..UNITS.len()).rfind(|&unit| bytes as f64 >= size_of_unit(unit)).unwrap_or(0)
}

fn size_of_unit(unit: usize) -> f64 {
    1024_f64.powi(unit as i32)
}

/// [`bytes`] of a file.
pub fn file_bytes(length: u64) -> String {
    bytes(usize::try_from(length).unwrap_or(usize::MAX))
}

/// A cache's bytes by what they hold: `linear states 2.9 MiB, kept rows 1.0 MiB`, the most first.
pub fn parts(bytes: &StateBytes) -> String {
    let mut parts = bytes.parts();
    parts.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
    let held = parts.iter().filter(|(_, bytes)| *bytes > 0);
    let words = held.map(|(name, held)| format!("{name} {}", self::bytes(*held)));
    words.collect::<Vec<_>>().join(", ")
}

/// A time in the units that people use: `8.3 s`, `12 min 5 s`, `2 h 8 min`.
pub fn seconds(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// A count with its thousands apart: `1,234,567`.
pub fn count(count: usize) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_may_be_of_any_length() {
        let long = "a".repeat(70_000);
        let text = render(
            &["model", "ppl"],
            &[vec![long.clone(), "1.5".into()], vec!["b".into(), long.clone()]],
        );
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.iter().map(|line| line.len()).max(), Some(140_002));
        assert!(lines[3].starts_with("b ") && lines[3].ends_with(&long));
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "1".into()], vec!["long".into(), "1000".into()]];
        assert_eq!(
            render(&["model", "ppl"], &rows),
            "model   ppl\n-----------\na         1\nlong   1000"
        );
    }

    #[test]
    fn times_and_counts_are_readable() {
        assert_eq!(seconds(8.26), "8.3 s");
        assert_eq!(seconds(725.0), "12 min 5 s");
        assert_eq!(seconds(7684.0), "2 h 8 min");
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
    }

    #[test]
    fn bytes_have_units() {
        assert_eq!(bytes(12), "12 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
        assert_eq!(bytes_of(0, 3 << 20), "0.0/3.0 MiB");
        assert_eq!(bytes_of(12, 100), "12/100 B");
    }
}

//! The table of several models: one column a model, one line a measurement.

use super::row::Row;
use crate::table;

/// A line: its name, and what each model's row says of it.
type Line<'a> = (String, Box<dyn Fn(&Row) -> Option<String> + 'a>);

/// Models side by side; the first one is what the others are compared with.
pub fn table(rows: &[Row]) -> String {
    let headers: Vec<&str> =
        std::iter::once("").chain(rows.iter().map(|row| row.model.as_str())).collect();
    table::render(&headers, &lines(rows))
}

/// The lines of [`table()`]: a name, and a cell for each model. Those that no model has are left out.
pub fn lines(rows: &[Row]) -> Vec<Vec<String>> {
    let teacher = rows.first();
    let recalls = rows.iter().find(|row| !row.recall.is_empty()).map(|row| row.recall.as_slice());
    let mut lines: Vec<Line<'_>> = vec![
        ("held-out perplexity".into(), Box::new(|row| Some(format!("{:.2}", row.perplexity?)))),
        (
            "  times the teacher's".into(),
            Box::new(|row| Some(format!("{:.3}", row.perplexity_ratio?.mean))),
        ),
        (
            "  95 % interval".into(),
            Box::new(|row| {
                let ratio = row.perplexity_ratio?;
                Some(format!("{:.3}–{:.3}", ratio.low, ratio.high))
            }),
        ),
    ];
    for (n, recall) in recalls.unwrap_or_default().iter().enumerate() {
        let name = format!("{} in {} tokens", recall.what, table::count(recall.length));
        let found = move |row: &Row| {
            let recall = row.recall.get(n)?;
            Some(format!("{} of {}", recall.right, recall.of))
        };
        lines.push((name, Box::new(found)));
    }
    let share = move |row: &Row| {
        let dense = teacher?.cache_bytes.filter(|&bytes| bytes > 0)?;
        Some(format!("{:.1} %", 100.0 * row.cache_bytes? as f64 / dense as f64))
    };
    lines.extend::<[Line<'_>; 5]>([
        (
            "repeated text, nats a token".into(),
            Box::new(|row| Some(format!("{:.2}", row.repeated_nll?))),
        ),
        ("attention cache".into(), Box::new(|row| Some(table::bytes(row.cache_bytes?)))),
        ("  of the teacher's".into(), Box::new(share)),
        (
            "prefill, tokens/s".into(),
            Box::new(|row| Some(table::count(row.prefill_tokens_per_s?.round() as usize))),
        ),
        (
            "decode, tokens/s".into(),
            Box::new(|row| Some(format!("{:.1}", row.decode_tokens_per_s?))),
        ),
    ]);
    let cells = lines.iter().filter_map(|(name, value)| {
        let values: Vec<Option<String>> = rows.iter().map(value).collect();
        let cell = |value: Option<String>| value.unwrap_or_else(|| "–".into());
        let some = values.iter().any(Option::is_some);
        some.then(|| {
            std::iter::once(name.clone()).chain(values.into_iter().map(cell)).collect::<Vec<_>>()
        })
    });
    cells.collect()
}

#[cfg(test)]
mod tests {
    use still_eval::Interval;

    use super::*;
    use crate::verdict::TEACHER;
    use crate::verdict::row::Recall;

    #[test]
    fn what_no_model_has_has_no_line_and_all_fits_80_columns() {
        let recall = |right| Recall { what: "pass keys".into(), right, of: 4, length: 4096 };
        let teacher = Row {
            perplexity: Some(1234.5),
            recall: vec![recall(4)],
            cache_bytes: Some(100 << 20),
            ..Row::named(TEACHER)
        };
        let ratio = Interval { mean: 1.0712, low: 1.06, high: 1.08 };
        let student = Row {
            perplexity_ratio: Some(ratio),
            recall: vec![recall(3)],
            cache_bytes: Some(10 << 20),
            ..Row::named("untrained")
        };
        let text = table(&[teacher.clone(), student.clone(), student]);
        let line = |name: &str| text.lines().find(|line| line.trim_start().starts_with(name));
        let found = line("pass keys in 4,096 tokens").unwrap().split_whitespace().skip(5);
        assert_eq!(found.collect::<String>(), "4of43of43of4", "{text}");
        assert!(line("of the teacher's").unwrap().contains("100.0 %"), "{text}");
        assert!(line("95 % interval").unwrap().contains("1.060–1.080"), "{text}");
        assert!(line("held-out perplexity").unwrap().ends_with('–'), "{text}");
        assert_eq!(line("decode"), None);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
}

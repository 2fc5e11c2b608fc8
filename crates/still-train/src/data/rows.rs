//! Rows of Parquet as lines of JSON: of a table only the columns that a document is made of are read.

use std::path::Path;
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::Type;

use super::documents::{BATCH_BYTES, Entry, data_error};
use super::kind::open;
use super::line::is_asked_for;
use crate::error::Result;

/// Rows, numbered from 1, a few megabytes at a time; `field` holds a row's text.
///
/// # Errors
/// A file that is none of Parquet, is damaged, or has no column of a document; a row longer than `most` bytes of JSON, by its
/// number; an error of `each`.
pub(super) fn for_each_batch(
    path: &Path,
    field: &str,
    most: usize,
    each: &mut dyn FnMut(Vec<Entry>) -> Result<()>,
) -> Result<()> {
    let damaged = |error: ParquetError| {
        let hint = "the file is damaged, incomplete, or compressed in another way than gzip, snappy, zstd or lz4";
        data_error(path, error.to_string(), hint)
    };
    let reader = SerializedFileReader::new(open(path)?).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<Arc<Type>> = schema.get_fields().to_vec();
    let wanted: Vec<Arc<Type>> =
        columns.iter().filter(|column| is_asked_for(column.name(), field)).cloned().collect();
    if wanted.is_empty() {
        let names: Vec<&str> = columns.iter().map(|column| column.name()).collect();
        return Err(data_error(
            path,
            format!(
                "no column \"{field}\", \"messages\" or \"instruction\" among {}",
                names.join(", ")
            ),
            "name the column that holds the text with --set data.text_field=NAME",
        ));
    }
    let projection =
        Type::group_type_builder(schema.name()).with_fields(wanted).build().map_err(damaged)?;
    let (mut batch, mut bytes) = (Vec::new(), 0);
    let rows = reader.get_row_iter(Some(projection)).map_err(damaged)?;
    for (index, row) in rows.enumerate() {
        let place = format!("row {}", index + 1);
        let json = row.map_err(damaged)?.to_json_value().to_string();
        if json.len() > most {
            return Err(data_error(
                path,
                format!("{place} is longer than {most} bytes (data.max_line_bytes)"),
                "divide it, or raise the limit with --set data.max_line_bytes=N",
            ));
        }
        bytes += json.len();
        batch.push(Entry { place, json });
        if bytes >= BATCH_BYTES {
            each(std::mem::take(&mut batch))?;
            bytes = 0;
        }
    }
    each(batch)
}

#[cfg(test)]
mod tests {
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// A table of a text and a number.
    fn table(path: &Path, texts: &[&str]) {
        let schema = "message m { required binary text (UTF8); required int32 id; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = std::fs::File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts: Vec<ByteArray> = texts.iter().map(|&text| text.into()).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        let ids: Vec<i32> = (0..texts.len() as i32).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
    }

    fn read(path: &Path, field: &str, most: usize) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        for_each_batch(path, field, most, &mut |batch| {
            all.extend(batch);
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn a_row_is_a_line_of_its_wanted_columns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.parquet");
        table(&path, &["one \"quoted\"\n", "zwei ü"]);
        let entries = read(&path, "text", 100).unwrap();
        let json: Vec<serde_json::Value> =
            entries.iter().map(|entry| serde_json::from_str(&entry.json).unwrap()).collect();
        assert_eq!(
            json,
            [
                serde_json::json!({ "text": "one \"quoted\"\n" }),
                serde_json::json!({ "text": "zwei ü" }),
            ]
        );
        assert_eq!(entries[1].place, "row 2");
        let said = |field, most| read(&path, field, most).unwrap_err().to_string();
        assert!(said("body", 100).contains("no column \"body\""), "{}", said("body", 100));
        assert!(said("body", 100).contains("text, id"));
        assert!(said("text", 20).contains("row 1 is longer than 20 bytes"));
        std::fs::write(&path, "PAR1 and nothing more").unwrap();
        assert!(read(&path, "text", 100).is_err());
    }
}

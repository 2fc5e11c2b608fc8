//! `src/ffi.rs`, `src/decoder.rs` and `src/dense.rs` declare what the headers in `src/cuda` do: a call through a stale declaration would corrupt
//! memory.

use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A header without comments and preprocessor lines, spaces made one.
fn header(path: &str) -> String {
    let text = read(path);
    let code = text.lines().filter(|line| !line.starts_with('#'));
    let code: Vec<&str> = code.map(|line| line.split("//").next().unwrap_or("")).collect();
    code.join(" ").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A C type in Rust.
fn rust_type(c: &str) -> String {
    let (c, constant) = match c.strip_prefix("const ") {
        Some(rest) => (rest, "*const "),
        None => (c, "*mut "),
    };
    if let Some(to) = c.strip_suffix('*') {
        return format!("{constant}{}", rust_type(to.trim_end()));
    }
    match c {
        "void" => "c_void",
        "int" => "c_int",
        "float" => "f32",
        "double" => "f64",
        "int32_t" => "i32",
        "int64_t" => "i64",
        "uint32_t" => "u32",
        "uint64_t" => "u64",
        other => other.strip_prefix("Still").unwrap_or_else(|| panic!("no Rust type for {other}")),
    }
    .into()
}

/// `(name, Rust type)` of each of `const float *a, *b`, of `StillRows q` and the like.
fn declared(c: &str) -> Vec<(String, String)> {
    let c = c.trim();
    let (first, rest) = match c.split_once(',') {
        Some((first, rest)) => (first, Some(rest)),
        None => (c, None),
    };
    let split = first.rfind([' ', '*']).expect("a type and a name") + 1;
    let (kind, name) = (first[..split].trim().replace(" *", "*"), &first[split..]);
    let base = kind.trim_end_matches('*').to_owned();
    let mut all = vec![(name.to_owned(), rust_type(&kind))];
    for other in rest.into_iter().flat_map(|rest| rest.split(',')) {
        let other = other.trim();
        let stars = other.len() - other.trim_start_matches('*').len();
        let kind = format!("{base}{}", "*".repeat(stars));
        all.push((other[stars..].to_owned(), rust_type(&kind)));
    }
    all
}

/// Code without comments and spaces.
fn squeezed(text: &str) -> String {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.flat_map(str::chars).filter(|c| !c.is_whitespace()).collect()
}

#[test]
fn declarations_equal_the_headers() {
    assert_eq!(compared("src/cuda/still.h", "src/ffi.rs"), (10, 24));
    assert_eq!(compared("src/cuda/decoder.h", "src/decoder.rs"), (5, 12));
    assert_eq!(compared("src/cuda/dense.h", "src/dense.rs"), (5, 5));
}

/// Holds a file of declarations against a header; how many structures and functions that has.
fn compared(header_path: &str, path: &str) -> (usize, usize) {
    let (header, ours) = (header(header_path), squeezed(&read(path)));
    let mut structures = 0;
    for body in header.split("typedef struct {").skip(1) {
        let (fields, rest) = body.split_once('}').expect("a closed structure");
        let name = rest.trim().split(';').next().and_then(|name| name.strip_prefix("Still"));
        let mut expected = format!("pub struct {} {{", name.expect("a name"));
        for field in fields.split(';').map(str::trim).filter(|field| !field.is_empty()) {
            for (name, kind) in declared(field) {
                expected += &format!("pub {name}: {kind},");
            }
        }
        assert!(ours.contains(&squeezed(&(expected.clone() + "}"))), "{path} lacks {expected}}}");
        structures += 1;
    }
    let mut functions = 0;
    for (at, _) in header.match_indices("still_") {
        let Some((declaration, _)) = header[at..].split_once(");") else { continue };
        let Some((name, parameters)) = declaration.split_once('(') else { continue };
        let result = header[..at].trim_end().rsplit(' ').next().expect("a result");
        if !["int", "int64_t"].contains(&result) || name.contains(' ') {
            continue;
        }
        let parameters: Vec<String> = parameters
            .split(',')
            .flat_map(declared)
            .map(|(name, kind)| format!("{name}: {kind}"))
            .collect();
        let parameters = parameters.join(", ");
        let expected = format!("pub fn {name}({parameters}) -> {};", rust_type(result));
        assert!(ours.contains(&squeezed(&expected)), "{path} lacks {expected}");
        functions += 1;
    }
    (structures, functions)
}

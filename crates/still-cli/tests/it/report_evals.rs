//! `still report eval`: hand-made ones and real ones.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{Outcome, assert_balanced, still, student_dir, teacher_dir};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A task's result as `still eval` writes it.
fn task(metric: &str, value: f64, length: Option<usize>) -> Value {
    let mut task = json!({
        metric: value, "stderr": 0.03, "n": 200,
        "intervals": { metric: [value - 0.06, value + 0.06] },
        "chance": if metric == "acc" { json!(0.25) } else { Value::Null },
        "mean_tokens": 60.0, "cache_bytes": 3.0 * (1 << 20) as f64, "truncated": 0,
    });
    if let Some(length) = length {
        task["length"] = json!(length);
        task["curve"] = json!([
            { "from": 1, "to": length / 2, "nll": 3.0 },
            { "from": length / 2, "to": length, "nll": 2.5 },
        ]);
    }
    task
}

fn tasks(shift: f64) -> Value {
    json!({
        "piqa": task("acc", 0.6 + shift, None),
        "arc_easy": task("acc", 0.5 + shift, None),
        "perplexity_1024": task("perplexity", 20.0 - 10.0 * shift, Some(1024)),
        "perplexity_4096": task("perplexity", 18.0 - 10.0 * shift, Some(4096)),
        "passkey_4096": task("score", 0.9 + shift, Some(4096)),
    })
}

fn point(context: usize, cache_bytes: usize) -> Value {
    json!({ "context": context, "prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 100.5,
        "batch": 1, "decode_p50_ms": 9.0, "decode_p99_ms": 12.0, "cache_bytes": cache_bytes })
}

/// A student with one variant, compared with its teacher.
fn results() -> Value {
    let difference = json!({
        "piqa": { "acc": { "mean": 0.05, "low": 0.01, "high": 0.09 } },
        "perplexity_1024": { "nll": { "mean": -0.25, "low": -0.5, "high": -0.125 } },
    });
    json!({
        "model": "some/where/student", "recipe": null, "seed": 7, "cache_dtype": "bf16", "limit": 200,
        "tasks": tasks(0.0),
        "efficiency": {
            "points": [point(1024, 3 << 20), point(4096, 5 << 20)],
            "fixed_bytes": 2_097_152.0, "bytes_per_token": 682.7, "threads": 2,
        },
        "compare": [
            { "model": "teacher.gguf", "recipe": null, "tasks": tasks(0.05), "difference": difference },
            { "model": "some/where/student [router: random]", "recipe": null, "ablation": "router: random",
              "tasks": tasks(-0.05), "difference": difference },
        ],
    })
}

fn write(dir: &TempDir, name: &str, value: &Value) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, serde_json::to_string_pretty(value).unwrap()).unwrap();
    path
}

fn report(paths: &[&Path], extra: &[&str]) -> Outcome {
    Outcome::of(still().args(["report", "eval"]).args(paths).args(extra))
}

#[test]
fn the_page_has_every_part_and_asks_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(&dir, "r.json", &results());
    let outcome = report(&[&path], &[]);
    outcome.succeeded();
    let page = fs::read_to_string(dir.path().join("r.html")).unwrap();
    assert_balanced(&page);
    for outside in ["http:", "https:", " src=", "<link", "@import", "url("] {
        assert!(!page.contains(outside), "the page refers to {outside}");
    }
    let body = &page[page.find("<body>").unwrap()..page.find("<script>").unwrap()];
    for wrong in ["NaN", "inf\"", "{{", "{%", "none", "undefined"] {
        assert!(!body.contains(wrong), "{wrong} in the page");
    }
    for part in [
        "<dt>Models</dt><dd>2</dd>",
        "<dt>Answers</dt><dd>3,000</dd>",
        "<dt>Seed</dt><dd>7</dd>",
        // Scatter, bars and curves have values, intervals and chance.
        "student\ncache, MiB 3\npiqa 60 [54, 66]\"",
        "data-tip=\"chance 25\"",
        "task piqa\nstudent 60 [54, 66]\nteacher.gguf 65 [59, 71]\nchance 25\"",
        "perplexity_4096 by position",
        "<td>65.00 [59.0, 71.0]</td>",
        "<tr><td>piqa</td><td>acc</td><td>200</td><td>25.00</td>",
        "<th>student − teacher.gguf</th>",
        "<td>piqa</td><td>acc</td><td>+5.00 [+1.00, +9.00]</td>",
        "<td>nll</td><td>-0.2500 [-0.5000, -0.1250]</td>",
        // The variant lost what the student has more.
        "<th>student: router</th><th>piqa, points</th><th>perplexity_1024, nats</th>",
        "<td class=\"worse\" style=\"--level:0.7\" data-tip=\"95 % interval -9.0 to -1.0\">-5.0</td>",
        "data-tip=\"95 % interval +0.125 to +0.500\">+0.250</td>",
        "<td>1024</td><td>1000</td><td>100.5</td><td>3.0 MiB</td><td>2.0 MiB</td><td>683 B</td><td>2</td>",
    ] {
        assert!(body.contains(part), "no {part:?} in the page");
    }
    // Four tasks against bytes (of perplexity the longest), accuracy and score as bars, perplexity over lengths and by
    // position, pass keys by position, and three of efficiency.
    assert_eq!(body.matches("<figure").count(), 4 + 2 + 3 + 3);
}

/// Results that say which model is a student, and of which base; with what made them.
fn of_known_models() -> Value {
    let mut results = results();
    (results["student"], results["base"]) = (json!(true), json!("teacher.gguf"));
    results["provenance"] = json!({ "model": "some/where/student", "command": "still eval --model s",
        "date": "2026-11-29 20:21", "machine": "a CPU, 2 threads", "version": "1.2" });
    let compare = &mut results["compare"];
    (compare[0]["student"], compare[0]["base"]) = (json!(false), json!("teacher.gguf"));
    (compare[1]["student"], compare[1]["base"]) = (json!(true), json!("teacher.gguf"));
    results
}

#[test]
fn the_verdict_comes_first_and_the_teacher_is_marked() {
    let dir = tempfile::tempdir().unwrap();
    let unknown = write(&dir, "old.json", &results());
    report(&[&unknown], &[]).succeeded();
    let old = fs::read_to_string(dir.path().join("old.html")).unwrap();
    assert!(old.contains("No verdict") && !old.contains("(teacher)"), "older files do not say");

    let path = write(&dir, "r.json", &of_known_models());
    let outcome = report(&[&path], &[]);
    outcome.succeeded();
    let page = fs::read_to_string(dir.path().join("r.html")).unwrap();
    assert_balanced(&page);
    let body = &page[page.find("<body>").unwrap()..page.find("<script>").unwrap()];
    // Of the windows that were compared, and of 200 keys, of which the teacher finds ten more.
    let sentence = "Usable, with losses: perplexity is 0.779 times the teacher's (95 %: 0.607 to 0.882); the student finds 180 of 200 answers in long prompts (teacher: 190). It takes 100 % of the teacher's cache bytes. \
        Accuracy on 1 task of 200 items: no 95 % interval of the difference lies below 0. \
        Cache: mean over the items of passkey_4096.";
    let escaped = sentence.replace('\'', "&#x27;");
    let verdict =
        format!("<strong>student</strong> compared with teacher.gguf (teacher). {escaped}");
    assert!(body.contains(&verdict), "{body}");
    assert!(
        body.find("class=\"verdict\"") < body.find("class=\"figures\""),
        "the verdict is first"
    );
    for part in [
        "<title>still report eval: student, teacher.gguf (teacher)</title>",
        "<th>teacher.gguf (teacher)</th>",
        "</i>teacher.gguf (teacher)</span>",
        "<dt>Command</dt><dd>still eval --model s</dd>",
        "<dt>Machine</dt><dd>a CPU, 2 threads</dd>",
    ] {
        assert!(page.contains(part), "no {part:?} in the page");
    }
    let words = outcome.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        words.starts_with(&format!("student compared with teacher.gguf. {sentence}")),
        "{words}"
    );

    let outcome = report(&[&path], &["--json"]);
    outcome.succeeded();
    let json = outcome.json();
    assert_eq!(json["verdicts"][0]["teacher"], "teacher.gguf");
    let roles: Vec<&Value> =
        json["subjects"].as_array().unwrap().iter().map(|s| &s["role"]).collect();
    assert_eq!(roles, [&json!("student"), &json!("teacher"), &json!("student")]);
}

#[test]
fn the_tables_are_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(&dir, "r.json", &results());
    let markdown = dir.path().join("r.md");
    let outcome = report(&[&path], &["--quiet", "--markdown", markdown.to_str().unwrap()]);
    outcome.succeeded();
    assert!(outcome.stderr.is_empty(), "{}", outcome.stderr);
    insta::assert_snapshot!(outcome.stdout, @r"
    task                 metric    n  chance                student           teacher.gguf
    --------------------------------------------------------------------------------------
    piqa                    acc  200   25.00     60.00 [54.0, 66.0]     65.00 [59.0, 71.0]
    arc_easy                acc  200   25.00     50.00 [44.0, 56.0]     55.00 [49.0, 61.0]
    perplexity_1024  perplexity  200       –  20.000 [19.94, 20.06]  19.500 [19.44, 19.56]
    perplexity_4096  perplexity  200       –  18.000 [17.94, 18.06]  17.500 [17.44, 17.56]
    passkey_4096          score  200       –     90.00 [84.0, 96.0]    95.00 [89.0, 101.0]

    task             metric      student − teacher.gguf
    ---------------------------------------------------
    piqa                acc        +5.00 [+1.00, +9.00]
    perplexity_1024     nll  -0.2500 [-0.5000, -0.1250]

    variant                           piqa (acc)      arc_easy (acc)  perplexity_1024 (perplexity)  perplexity_4096 (perplexity)  passkey_4096 (score)
    --------------------------------------------------------------------------------------------------------------------------------------------------
    student [router: random]  55.00 [49.0, 61.0]  45.00 [39.0, 51.0]         20.500 [20.44, 20.56]         18.500 [18.44, 18.56]    85.00 [79.0, 91.0]

    model    tokens  prefill tokens/s  decode tokens/s    cache    fixed  per token  threads
    ----------------------------------------------------------------------------------------
    student    1024              1000            100.5  3.0 MiB  2.0 MiB      683 B        2
    student    4096              1000            100.5  5.0 MiB  2.0 MiB      683 B        2
    ");
    insta::assert_snapshot!(fs::read_to_string(markdown).unwrap(), @r#"
    ## Results

    | task | metric | n | chance | student | teacher.gguf |
    |---|---:|---:|---:|---:|---:|
    | piqa | acc | 200 | 25.00 | 60.00 [54.0, 66.0] | 65.00 [59.0, 71.0] |
    | arc_easy | acc | 200 | 25.00 | 50.00 [44.0, 56.0] | 55.00 [49.0, 61.0] |
    | perplexity_1024 | perplexity | 200 | – | 20.000 [19.94, 20.06] | 19.500 [19.44, 19.56] |
    | perplexity_4096 | perplexity | 200 | – | 18.000 [17.94, 18.06] | 17.500 [17.44, 17.56] |
    | passkey_4096 | score | 200 | – | 90.00 [84.0, 96.0] | 95.00 [89.0, 101.0] |

    ## Differences

    | task | metric | student − teacher.gguf |
    |---|---:|---:|
    | piqa | acc | +5.00 [+1.00, +9.00] |
    | perplexity_1024 | nll | -0.2500 [-0.5000, -0.1250] |

    ## Variants

    | variant | piqa (acc) | arc_easy (acc) | perplexity_1024 (perplexity) | perplexity_4096 (perplexity) | passkey_4096 (score) |
    |---|---:|---:|---:|---:|---:|
    | student [router: random] | 55.00 [49.0, 61.0] | 45.00 [39.0, 51.0] | 20.500 [20.44, 20.56] | 18.500 [18.44, 18.56] | 85.00 [79.0, 91.0] |

    ## Efficiency

    | model | tokens | prefill tokens/s | decode tokens/s | cache | fixed | per token | threads |
    |---|---:|---:|---:|---:|---:|---:|---:|
    | student | 1024 | 1000 | 100.5 | 3.0 MiB | 2.0 MiB | 683 B | 2 |
    | student | 4096 | 1000 | 100.5 | 5.0 MiB | 2.0 MiB | 683 B | 2 |

    Shares are in per cent, with their 95 % interval: Wilson's where every answer is right or wrong, else 1.96 standard errors to either side. Intervals of differences are from a paired bootstrap over items, of perplexities in nats of negative log-likelihood. "–" is what was not measured, or has no chance level.
    "#);

    let outcome =
        report(&[&path], &["--json", "--out", dir.path().join("x.html").to_str().unwrap()]);
    outcome.succeeded();
    let json = outcome.json();
    assert!(dir.path().join("x.html").exists());
    assert_eq!(json["subjects"][1]["name"], "teacher.gguf");
    assert_eq!(json["subjects"][2]["ablation"], "router: random");
    assert_eq!(json["subjects"][0]["efficiency"]["points"][1]["cache_bytes"], 5 << 20);
}

#[test]
fn files_are_put_together() {
    let dir = tempfile::tempdir().unwrap();
    let first = write(&dir, "a.json", &results());
    // Another student beside the same teacher, and of it a task more; its path ends as the first one's.
    let mut other = results();
    other["model"] = json!("elsewhere/student");
    other["compare"].as_array_mut().unwrap().pop();
    other["compare"][0]["tasks"]["mmlu"] = task("acc", 0.3, None);
    other["tasks"]["mmlu"] = task("acc", 0.27, None);
    let second = write(&dir, "b.json", &other);
    let outcome = report(&[&first, &second], &["--json"]);
    outcome.succeeded();
    let subjects = outcome.json()["subjects"].clone();
    let names: Vec<&str> = subjects
        .as_array()
        .unwrap()
        .iter()
        .map(|subject| subject["name"].as_str().unwrap())
        .collect();
    let expected =
        ["some/where/student", "teacher.gguf", "elsewhere/student", "student [router: random]"];
    assert_eq!(names, expected);
    assert_eq!(subjects[1]["tasks"].as_array().unwrap().len(), 6);
    let page = fs::read_to_string(dir.path().join("a.html")).unwrap();
    assert_balanced(&page);
    // Who was not asked has a dash.
    assert!(
        page.contains("<td>mmlu</td><td>acc</td><td>200</td><td>25.00</td><td>–</td>"),
        "{page}"
    );

    other["compare"][0]["tasks"]["piqa"]["acc"] = json!(0.1);
    let third = write(&dir, "c.json", &other);
    report(&[&first, &third], &[])
        .failed_with("c.json: another file says otherwise of piqa of teacher.gguf");
}

/// Two runs of `--compare` about the same two models, each with tasks of its own.
#[test]
fn one_difference_of_two_files_is_one_column() {
    let dir = tempfile::tempdir().unwrap();
    let of = |task: &str| {
        let keep =
            |value: &mut Value| value.as_object_mut().unwrap().retain(|name, _| name == task);
        let mut results = results();
        keep(&mut results["tasks"]);
        results["compare"].as_array_mut().unwrap().truncate(1);
        keep(&mut results["compare"][0]["tasks"]);
        keep(&mut results["compare"][0]["difference"]);
        write(&dir, &format!("{task}.json"), &results)
    };
    let outcome = report(&[&of("piqa"), &of("perplexity_1024")], &["--quiet"]);
    outcome.succeeded();
    assert_eq!(outcome.stdout.matches("student − teacher.gguf").count(), 1, "{}", outcome.stdout);
    for row in ["+5.00 [+1.00, +9.00]", "-0.2500 [-0.5000, -0.1250]"] {
        assert!(outcome.stdout.contains(row), "{}", outcome.stdout);
    }
}

/// Two parts changed together: a table of settings by settings for every task.
#[test]
fn a_cross_product_is_drawn_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut results = results();
    let variant = |router: &str, budget: usize, mean: f64| {
        let ablation = format!("router: {router}, budgets: {budget} of 64");
        let (low, high) = (mean - 0.01, mean + 0.01);
        json!({ "model": format!("some/where/student [{ablation}]"), "recipe": null, "ablation": ablation,
            "tasks": { "piqa": task("acc", 0.6 - mean, None) },
            "difference": { "piqa": { "acc": { "mean": mean, "low": low, "high": high } } } })
    };
    let others = [
        variant("self_saliency", 0, 0.3),
        variant("self_saliency", 16, -0.1),
        variant("random", 4, 0.2),
        variant("random", 16, 0.15),
    ];
    results["compare"].as_array_mut().unwrap().truncate(1);
    results["compare"].as_array_mut().unwrap().extend(others);
    results["skipped"] = json!([
        { "ablation": "router: self_saliency, budgets: 4 of 64", "same_as": "the student itself" },
        { "ablation": "router: random, budgets: 0 of 64", "same_as": "router: self_saliency, budgets: 0 of 64" },
        { "ablation": "router: none, budgets: 4 of 64", "impossible": "a <reason>" },
    ]);
    let path = write(&dir, "r.json", &results);
    report(&[&path], &[]).succeeded();
    let page = fs::read_to_string(dir.path().join("r.html")).unwrap();
    assert_balanced(&page);
    let table = &page[page.find("<th>student, piqa, points: router ↓ budgets →</th>").unwrap()..];
    let table = &table[..table.find("</table>").unwrap()];
    let headers = "<th>0 of 64</th><th>4 of 64</th><th>16 of 64</th>";
    assert!(table.contains(headers), "{table}");
    let cells = |row: &str| -> Vec<String> {
        let row = table.split(&format!("<tr><td>{row}</td>")).nth(1).unwrap();
        let cells = row[..row.find("</tr>").unwrap()].split("<td ").skip(1);
        cells
            .map(|cell| cell.split('>').nth(1).unwrap().split('<').next().unwrap().into())
            .collect()
    };
    assert_eq!(cells("self_saliency"), ["-30.0", "student", "+10.0"]);
    // Without a budget no router has a say.
    assert_eq!(cells("random"), ["-30.0", "-20.0", "-15.0"]);
    assert_eq!(cells("none"), ["–", "–", "–"]);
    for tip in [
        "a &lt;reason&gt;",
        "the same as router: self_saliency, budgets: 0 of 64\n95 % interval -31.0 to -29.0",
    ] {
        assert!(table.contains(tip), "no {tip:?} in {table}");
    }
}

/// Perplexities of very different size do not hide each other.
#[test]
fn every_perplexity_has_its_own_scale() {
    let dir = tempfile::tempdir().unwrap();
    let mut results = results();
    results["compare"].as_array_mut().unwrap().truncate(1);
    let asked = |model: &mut Value, calm: f64, wild: f64| {
        model["tasks"] = json!({
            "perplexity_4096": task("perplexity", calm, None),
            "repeated_text_4096": task("perplexity", wild, None),
        });
    };
    asked(&mut results, 30.0, 100.0);
    asked(&mut results["compare"][0], 33.0, 400_000.0);
    let path = write(&dir, "r.json", &results);
    report(&[&path], &[]).succeeded();
    let page = fs::read_to_string(dir.path().join("r.html")).unwrap();
    let page = &page[page.find("<h2>Tasks</h2>").unwrap()..];
    let heights = |task: &str, about: &str| -> Vec<f64> {
        let caption =
            format!("<figcaption>{task} <small>perplexity, less is better{about}</small>");
        let figure = page.split(&caption).nth(1).unwrap_or_else(|| panic!("no {caption}"));
        let bars = figure[..figure.find("</figure>").unwrap()].split("<rect class=\"s").skip(1);
        let height = |bar: &str| bar.split("height=\"").nth(1)?.split('"').next()?.parse().ok();
        bars.map(|bar| height(bar).unwrap()).collect()
    };
    let calm = heights("perplexity_4096", "");
    assert!((calm[1] / calm[0] - 33.0 / 30.0).abs() < 0.01, "{calm:?}");
    let wild = heights("repeated_text_4096", ", logarithmic");
    let nats = [100f64, 400_000.0].map(f64::ln);
    assert!((wild[1] / wild[0] - nats[1] / nats[0]).abs() < 0.01, "{wild:?}");
}

/// Written before cache bytes, intervals and lengths were.
#[test]
fn older_results_are_drawn_with_what_they_have() {
    let dir = tempfile::tempdir().unwrap();
    let old = json!({ "model": "m", "recipe": null, "seed": 0, "limit": null,
        "tasks": { "piqa": { "acc": 0.5, "stderr": 0.1, "n": 20, "chance": 0.5 } } });
    let path = write(&dir, "old.json", &old);
    let outcome = report(&[&path], &[]);
    outcome.succeeded();
    let page = fs::read_to_string(dir.path().join("old.html")).unwrap();
    assert_balanced(&page);
    assert!(!page.contains("Quality against cache bytes") && !page.contains("Efficiency</h2>"));
    assert!(page.contains("<td>50.00</td>"), "{page}");
}

#[test]
fn names_cannot_become_markup() {
    let dir = tempfile::tempdir().unwrap();
    let evil = "x<script>alert(1)<\\script>";
    let mut results = results();
    results["model"] = json!(evil);
    results["compare"][1]["ablation"] = json!(format!("{evil}: {evil}"));
    results["tasks"][evil] = task("acc", 0.5, None);
    let path = write(&dir, "r.json", &results);
    report(&[&path], &[]).succeeded();
    let page = fs::read_to_string(dir.path().join("r.html")).unwrap();
    assert!(!page.contains("<script>alert"), "{page}");
    assert_balanced(&page);
}

#[test]
fn what_is_no_result_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = write(&dir, "good.json", &results());
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let missing = dir.path().join("missing");
    report(&[&missing], &[]).failed_with("missing");
    report(&[&good, &missing], &[]).failed_with("missing");
    report(&[&good, dir.path()], &[])
        .failed_with("is a directory, not a file that `still eval --out` wrote");
    report(&[&file("t.txt", "text")], &[]).failed_with("t.txt is no result of `still eval --out`");
    report(&[&file("o.json", "{\"a\": 1}")], &[]).failed_with("missing field `model`");
    // A log of samples.
    let lines = "{\"model\":\"m\",\"task\":\"piqa\"}\n{\"model\":\"m\",\"task\":\"piqa\"}\n";
    report(&[&file("s.jsonl", lines)], &[]).failed_with("s.jsonl is no result");
    let empty = json!({ "model": "m", "tasks": {} });
    report(&[&write(&dir, "e.json", &empty)], &[]).failed_with("holds no result");
    let text = good.to_str().unwrap();
    report(&[&good], &["--out", text]).failed_with("would replace");
    report(&[&good], &["--out", dir.path().to_str().unwrap()]).failed_with("is a directory");
    report(&[dir.path()], &["--markdown", "x.md"]).failed_with("is a directory, not a file");
}

/// From models to the page.
#[test]
fn real_results_are_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let (text, results) = (dir.path().join("t.txt"), dir.path().join("r.json"));
    fs::write(&text, "The sea was calm, and nobody on the shore looked at it. ".repeat(40))
        .unwrap();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../still-eval/tests/data");
    let tasks = "piqa,arc_easy,lambada_openai,perplexity,repeated_text";
    let outcome = Outcome::of(
        still()
            .args(["eval", "--data-dir", data, "--tasks", tasks, "--lengths", "100,300"])
            .args(["--limit", "3", "--ablate", "branches", "--efficiency", "128,512", "--model"])
            .arg(student_dir())
            .arg("--compare")
            .arg(teacher_dir())
            .arg("--text")
            .arg(&text)
            .arg("--out")
            .arg(&results),
    );
    outcome.succeeded();
    assert!(outcome.stdout.contains("decode tokens/s"), "{}", outcome.stdout);
    let found: Value = serde_json::from_str(&fs::read_to_string(&results).unwrap()).unwrap();
    // Keys and values of 2 layers, 2 heads and 8 channels, 4 bytes each.
    let teacher = found["compare"].as_array().unwrap().last().unwrap();
    assert!(teacher["ablation"].is_null());
    let per_token = (2 * 2 * 8 * 2 * 4) as f64;
    assert_eq!(teacher["efficiency"]["bytes_per_token"].as_f64(), Some(per_token), "{teacher}");
    assert!(teacher["efficiency"]["fixed_bytes"].as_f64().unwrap().abs() < 1.0, "{teacher}");
    // Keys lie in tiles of 16 tokens, values do not.
    let window = &teacher["tasks"]["perplexity_300"];
    let expected = (304.0 + 299.0) * per_token / 2.0;
    assert_eq!(window["cache_bytes"].as_f64(), Some(expected), "{window}");
    assert_eq!(window["length"], 300);
    assert!(found["efficiency"]["fixed_bytes"].as_f64().unwrap() > 1000.0, "{found}");
    assert_eq!(found["compare"][0]["ablation"], "branches: window");
    for timing in [&found["timing"]["piqa"], &teacher["timing"]["perplexity_100"]] {
        assert!(
            timing["tokens"].as_u64().unwrap() > 0 && timing["seconds"].as_f64().unwrap() > 0.0
        );
    }

    report(&[&results], &[]).succeeded();
    let page = fs::read_to_string(dir.path().join("r.html")).unwrap();
    assert_balanced(&page);
    assert!(page.contains(": branches</th>") && page.contains("by position"));
}

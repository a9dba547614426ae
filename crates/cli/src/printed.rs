//! What programs print may steer a terminal: move the cursor over other lines, set the clipboard, answer for the person
//! who reads. Only colours pass.

use std::borrow::Cow;

/// The text as it may be written to a terminal: colours stay, and are turned off at its end; other control characters,
/// and those that change the direction of writing, are shown by their names.
pub fn safe(text: &str) -> Cow<'_, str> {
    if !text.chars().any(steers) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut coloured = false;
    let mut rest = text;
    while let Some(at) = rest.find(steers) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        match colour(rest) {
            Some(length) => {
                coloured = true;
                out.push_str(&rest[..length]);
                rest = &rest[length..];
            }
            None => {
                let mut chars = rest.chars();
                out.extend(chars.next().into_iter().flat_map(char::escape_default));
                rest = chars.as_str();
            }
        }
    }
    out.push_str(rest);
    if coloured {
        out.push_str("\x1b[0m");
    }
    Cow::Owned(out)
}

fn steers(c: char) -> bool {
    let turns_direction = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    (c.is_control() && c != '\t') || turns_direction
}

/// Length of a sequence at the start of the text that only sets colours and weights: `ESC [ 1 ; 31 m`.
fn colour(text: &str) -> Option<usize> {
    let numbers = text.strip_prefix("\x1b[")?;
    let end = numbers.find(|c: char| !c.is_ascii_digit() && c != ';' && c != ':')?;
    numbers[end..].starts_with('m').then_some("\x1b[".len() + end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_colours_pass() {
        let check = |text: &str, expected: &str| assert_eq!(safe(text), expected);
        check("plain, ünïcode and\ttabs", "plain, ünïcode and\ttabs");
        check("\x1b[1;31mred\x1b[0m rest", "\x1b[1;31mred\x1b[0m rest\x1b[0m");
        check("up\x1b[1A\x1b[2Kover it", "up\\u{1b}[1A\\u{1b}[2Kover it");
        // Title, clipboard, a question that the terminal answers as if typed, a carriage return, one byte for `ESC [`.
        check("\x1b]0;root@host\x07", "\\u{1b}]0;root@host\\u{7}");
        check("\x1b]52;c;ZXZpbA==\x07", "\\u{1b}]52;c;ZXZpbA==\\u{7}");
        check("\x1b[6n", "\\u{1b}[6n");
        check("good\rbad", "good\\rbad");
        check("\u{9b}2J", "\\u{9b}2J");
        check("a\u{202e}b", "a\\u{202e}b");
        check("\x1b", "\\u{1b}");
        check("\x1b[31", "\\u{1b}[31");
    }
}

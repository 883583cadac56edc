#include "data/rows.h"

#include <doctest/doctest.h>

#include <string>

#include "src/fail.h"

using namespace orpo;

namespace {

Row parse(const std::string& line, RowRules rules = {}) {
  const std::string padded = line + std::string(64, ' ');
  return RowParser(rules).parse({padded.data(), line.size()});
}

// Why a line is no row; empty where it is one.
std::string why(const std::string& line, RowRules rules = {}) {
  try {
    parse(line, rules);
  } catch (const BadRow& bad) {
    return bad.text();
  }
  return "";
}

std::string turns(const Row& row) {
  std::string text;
  for (const Message& message : row.prompt) text += message.role + "=" + message.content + ";";
  return text;
}

constexpr RowRules single{.single_answers = true};
const std::string user = R"({"role":"user","content":"q"})", yes = R"({"role":"assistant","content":"yes"})",
                  no = R"({"role":"assistant","content":"no"})";

std::string lists(const std::string& prompt, const std::string& chosen, const std::string& rejected) {
  const std::string start = prompt.empty() ? "{" : concat("{\"prompt\":", prompt, ",");
  return concat(start, "\"chosen\":[", chosen, "],\"rejected\":[", rejected, "]}");
}

}  // namespace

TEST_CASE("strings: a user turn and two answers") {
  const Row row =
      parse(R"({"source":{"x":[1]},"chosen":"a\n\u00e9\ud83d\ude00","prompt":"q","rejected":"b","score":1.5})");
  CHECK(row.kind == Row::Kind::dialogue);
  CHECK(turns(row) == "user=q;");
  CHECK(row.chosen == "a\n\u00e9\U0001f600");
  CHECK(row.rejected == "b");
  CHECK_FALSE(row.single);
  CHECK(turns(parse(R"({"prompt":"","chosen":"a","rejected":"b","text":null})")) == "user=;");
}

TEST_CASE("messages: with a prompt, without one, with a string repeated inside") {
  for (const std::string& line : {lists("[" + user + "]", yes, no), lists("", user + "," + yes, user + "," + no),
                                  lists("\"q\"", user + "," + yes, user + "," + no), lists("\"q\"", yes, no),
                                  lists("[" + user + "]", user + "," + yes, user + "," + no),
                                  lists("\" q\\n\"", user + "," + yes, user + "," + no)}) {
    const Row row = parse(line);
    CHECK(turns(row).find("q") != std::string::npos);
    CHECK(row.prompt.size() == 1);
    CHECK(row.prompt[0].role == "user");
    CHECK(row.chosen == "yes");
    CHECK(row.rejected == "no");
  }
  const std::string system = R"({"role":"system","content":"s"})";
  const Row longer = parse(lists("", system + "," + user + "," + yes + "," + user + "," + yes,
                                 system + "," + user + "," + yes + "," + user + "," + no));
  CHECK(turns(longer) == "system=s;user=q;assistant=yes;user=q;");
  CHECK(longer.chosen == "yes");
  CHECK(longer.rejected == "no");
  CHECK(turns(parse(lists("[" + user + "," + yes + "]", user + "," + yes, user + "," + no))) ==
        "user=q;assistant=yes;user=q;");
}

TEST_CASE("token ids stay as they are") {
  const Row row = parse(R"({"prompt_ids":[],"chosen_ids":[1,2],"rejected_ids":[3,48999]})", {.vocabulary = 49000});
  CHECK(row.kind == Row::Kind::ids);
  CHECK(row.prompt_ids.empty());
  CHECK(row.chosen_ids == std::vector<int32_t>{1, 2});
  CHECK(row.rejected_ids == std::vector<int32_t>{3, 48999});
}

TEST_CASE("single answers where they are welcome") {
  const Row text = parse(R"({"text":"plain"})", single);
  CHECK(text.kind == Row::Kind::text);
  CHECK(text.chosen == "plain");
  CHECK(text.single);
  const Row strings = parse(R"({"prompt":"q","completion":"a"})", single);
  CHECK(turns(strings) == "user=q;");
  CHECK(strings.chosen == "a");
  CHECK(strings.rejected.empty());
  CHECK(strings.single);
  const Row messages = parse("{\"prompt\":[" + user + "],\"completion\":[" + yes + "]}", single);
  CHECK(turns(messages) == "user=q;");
  CHECK(messages.chosen == "yes");
  CHECK(turns(parse("{\"completion\":[" + user + "," + yes + "]}", single)) == "user=q;");
  CHECK(parse(R"({"prompt_ids":[7],"completion_ids":[1]})", single).chosen_ids == std::vector<int32_t>{1});
  CHECK_FALSE(parse(R"({"prompt":"q","chosen":"a","rejected":"b"})", single).single);
  const std::string needs = ": a single answer (rows without chosen and rejected need --objective sft)";
  CHECK(why(R"({"text":"plain"})") == "text" + needs);
  CHECK(why(R"({"prompt":"q","completion":"a"})") == "completion" + needs);
  CHECK(why(R"({"prompt_ids":[7],"completion_ids":[1]})") == "completion_ids" + needs);
}

TEST_CASE("lines that are no JSON, or no object") {
  CHECK(why("{\"prompt\": \"q\", \"chosen\": \"a") == "chosen: not JSON (the line ends inside a value)");
  CHECK(why("{\"prompt\": \"q\", \"chosen\": x}") == "chosen: not JSON (column 27)");
  CHECK(why("{\"a\": NaN}") == "not JSON (column 7)");
  CHECK(why("{\"prompt\": \"q\"} {}") == "prompt: not JSON (column 17)");
  CHECK(why("{\"prompt\": \"a\tb\"}") == "prompt: not JSON (column 14)");
  CHECK(why("prompt,chosen,rejected") == "not JSON (column 1)");
  CHECK(why("[1]") == "not an object (a list; JSON Lines has one object a line)");
  CHECK(why("\"x\"") == "not an object (a string)");
  CHECK(why("[") == "not JSON (the line ends inside a value)");
  CHECK(why("{\"prompt\":\"q\",\"chosen\":\"a\xff\",\"rejected\":\"b\"}") == "chosen: invalid UTF-8 (column 26)");
  CHECK(why("{\"prompt\":\"\xc3\",\"chosen\":\"a\",\"rejected\":\"b\"}") == "prompt: invalid UTF-8 (column 13)");
  CHECK(why(R"({"prompt":"q","chosen":"\ud800","rejected":"b"})").starts_with("chosen: not JSON (column "));
  CHECK(why(R"({"prompt":"q","chosen":"\udc00","rejected":"b"})").starts_with("chosen: not JSON (column "));
}

TEST_CASE("fields that are missing, twice there, of a wrong type, or of two layouts") {
  CHECK(why("{}") == "chosen: missing");
  CHECK(why(R"({"prompt":"q","rejected":"b"})") == "chosen: missing");
  CHECK(why(R"({"prompt":"q","chosen":"a"})") == "rejected: missing");
  CHECK(why(R"({"prompt":"q","chosen":"a","rejected":null})") == "rejected: missing");
  CHECK(why(R"({"chosen":"a","rejected":"b"})") == "prompt: missing");
  CHECK(why(lists("", yes, no)) == "prompt: missing (and the answers share no leading message)");
  CHECK(why(R"({"prompt":"q","chosen":"a","rejected":"b","prompt":"p"})") == "prompt: given twice");
  CHECK(why(R"({"prompt":1,"chosen":"a","rejected":"b"})") == "prompt: wrong type (a number; a string is needed)");
  CHECK(why(R"({"prompt":"q","chosen":{"a":1},"rejected":"b"})") ==
        "chosen: wrong type (an object; a string or a list of messages is needed)");
  CHECK(why(R"({"prompt":"q","chosen":true,"rejected":[]})") ==
        "chosen: wrong type (true or false; a string or a list of messages is needed)");
  CHECK(why(lists("", "3", no)) == "chosen[0]: wrong type (a number; an object with role and content is needed)");
  CHECK(why(lists("", R"({"role":"user"})", no)) == "chosen[0].content: missing");
  CHECK(why(lists("", R"({"content":"user"})", no)) == "chosen[0].role: missing");
  CHECK(why(lists("", user + R"(,{"role":"assistant","content":null})", no)) ==
        "chosen[1].content: wrong type (null; a string is needed)");
  CHECK(why(R"({"prompt":[],"chosen":"a","rejected":"b"})") ==
        "chosen: mixed layouts (a string after a prompt of messages)");
  CHECK(why("{\"prompt\":\"q\",\"chosen\":\"a\",\"rejected\":[" + no + "]}") ==
        "rejected: mixed layouts (one answer is a string, the other a list of messages)");
  CHECK(why(R"({"prompt":"q","chosen_ids":[1],"rejected_ids":[2]})") == "chosen_ids: mixed layouts (beside prompt)");
  CHECK(why(R"({"prompt":"q","chosen":"a","rejected":"b","text":"t"})") == "text: mixed layouts (beside prompt)");
  CHECK(why(R"({"prompt":"q","chosen":"a","completion":"t"})", single) == "completion: mixed layouts (beside chosen)");
  CHECK(why(R"({"chosen_ids":[1],"rejected_ids":[2]})") == "prompt_ids: missing");
  CHECK(why(R"({"prompt_ids":[1],"chosen_ids":[2]})") == "rejected_ids: missing");
}

TEST_CASE("answers that are empty, equal or not at the end") {
  CHECK(why(R"({"prompt":"q","chosen":"","rejected":"b"})") == "chosen: empty");
  CHECK(why(R"({"prompt":"q","chosen":"a","rejected":" \n"})") == "rejected: empty (white space only)");
  CHECK(why(R"({"prompt":"q","chosen":"a","rejected":"a"})") == "rejected: equal to chosen");
  CHECK(why(lists("[]", yes, no)) == "prompt: empty");
  CHECK(why(lists("\"q\"", "", no)) == "chosen: empty");
  CHECK(why(lists("", user + "," + yes, user + "," + yes)) == "rejected: equal to chosen");
  CHECK(why(lists("", user, user + "," + no)) == "chosen: assistant turn missing at the end (the last role is user)");
  CHECK(why(lists("[" + user + "]", yes, user)) ==
        "rejected: assistant turn missing at the end (the last role is user)");
  CHECK(why(lists("[" + user + "]", yes + "," + user + "," + yes, no)) ==
        "chosen: more than one message of its own (3 messages; chosen and rejected may differ in the last one only)");
  CHECK(why(lists("\"other\"", user + "," + yes, user + "," + no)) ==
        "prompt: differs from the user's messages (the lists must repeat a prompt string)");
  CHECK(why(lists("", R"({"role":"human","content":"q"})", no)) ==
        "chosen[0].role: unknown role ('human'; there are system, user, assistant)");
  CHECK(why(R"({"text":" "})", single) == "text: empty (white space only)");
}

TEST_CASE("token ids that are out of range, no integers or leave nothing to score") {
  const RowRules small{.vocabulary = 100};
  CHECK(why(R"({"prompt_ids":[1],"chosen_ids":[2,100],"rejected_ids":[3]})", small) ==
        "chosen_ids: token id out of range (100 at index 1; 0 to 99 exist)");
  CHECK(why(R"({"prompt_ids":[-1],"chosen_ids":[2],"rejected_ids":[3]})", small) ==
        "prompt_ids: token id out of range (-1 at index 0; 0 to 99 exist)");
  CHECK(why(R"({"prompt_ids":[18446744073709551615],"chosen_ids":[2],"rejected_ids":[3]})") ==
        "prompt_ids: token id out of range (18446744073709551615 at index 0; 0 to 2147483646 exist)");
  CHECK(why(R"({"prompt_ids":[1],"chosen_ids":[2.0],"rejected_ids":[3]})") ==
        "chosen_ids: not an integer (2.0 at index 0)");
  CHECK(why(R"({"prompt_ids":[1],"chosen_ids":["2"],"rejected_ids":[3]})") ==
        "chosen_ids: not an integer (a string at index 0)");
  CHECK(why(R"({"prompt_ids":"1","chosen_ids":[2],"rejected_ids":[3]})") ==
        "prompt_ids: wrong type (a string; a list of token ids is needed)");
  CHECK(why(R"({"prompt_ids":[1],"chosen_ids":[],"rejected_ids":[3]})") == "chosen_ids: empty");
  CHECK(why(R"({"prompt_ids":[1],"chosen_ids":[3],"rejected_ids":[3]})") == "rejected_ids: equal to chosen_ids");
  CHECK(why(R"({"prompt_ids":[],"chosen_ids":[1,2],"rejected_ids":[3]})") ==
        "rejected_ids: nothing to score (one token and no prompt)");
}

// Sentencepiece models (tokenizer.model). The file is a protocol buffer message, ModelProto of
// sentencepiece_model.proto; only the fields that ids depend on are read here. BPE pieces become a merge table, as
// transformers makes one; unigram pieces are searched by the sentencepiece library itself.
#include <sentencepiece_processor.h>

#include <cstring>

#include "src/fail.h"
#include "src/files.h"
#include "tokenizer/pipeline.h"
#include "tokenizer/unicode.h"

namespace orpo {
namespace {

// Fields of one protocol buffer message, in order.
class Fields {
 public:
  Fields(std::string_view message, const std::string& where) : rest_(message), where_(where) {}

  // Moves to the next field; false at the end.
  bool next() {
    if (rest_.empty()) return false;
    const uint64_t key = varint();
    number = key >> 3;
    switch (key & 7) {
      case 0:
        integer = varint();
        break;
      case 1:
        take(8);
        break;
      case 2:
        bytes = take(varint());
        break;
      case 5:
        bytes = take(4);
        break;
      default:
        broken();
    }
    return true;
  }
  float real() const {  // of a 32-bit field
    float value = 0;
    if (bytes.size() == sizeof value) std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }

  uint64_t number = 0, integer = 0;
  std::string_view bytes;

 private:
  [[noreturn]] void broken() const {
    fail(where_,
         ": is not a whole sentencepiece model; bring the file again (a tiktoken file needs its tokenizer.json)");
  }
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (rest_.empty()) broken();
      const auto byte = static_cast<unsigned char>(rest_.front());
      rest_.remove_prefix(1);
      value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    broken();
  }
  std::string_view take(uint64_t size) {
    if (size > rest_.size()) broken();
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }

  std::string_view rest_;
  const std::string& where_;
};

enum PieceType : uint64_t { unknown_piece = 2, control_piece = 3, user_defined_piece = 4 };
enum ModelType : uint64_t { unigram_model = 1, bpe_model = 2 };

struct Piece {
  std::string text;
  uint64_t type = 1;
};

Piece read_piece(std::string_view message, const std::string& where) {
  Piece piece;
  for (Fields f(message, where); f.next();) {
    if (f.number == 1) piece.text = f.bytes;
    if (f.number == 3) piece.type = f.integer;
  }
  return piece;
}

// Merges of a vocabulary that lists pieces only: every way to cut a piece into two others, in the order of the pieces'
// ids (sentencepiece numbers BPE pieces in the order in which it joined them), the shorter left part first.
std::vector<std::pair<std::string, std::string>> merges_of(const std::vector<Piece>& pieces,
                                                           const TextToId& vocabulary) {
  std::vector<std::pair<std::string, std::string>> merges;
  for (const Piece& piece : pieces) {
    const std::string_view text = piece.text;
    for (size_t cut = 0; cut < text.size();) {
      cut += unicode::decode(text, cut).size;
      if (cut < text.size() && vocabulary.contains(text.substr(0, cut)) && vocabulary.contains(text.substr(cut)))
        merges.emplace_back(text.substr(0, cut), text.substr(cut));
    }
  }
  return merges;
}

class LibraryModel : public WordModel {
 public:
  LibraryModel(std::string_view model, const std::string& where) {
    const auto status = processor_.LoadFromSerializedProto({model.data(), model.size()});
    if (!status.ok()) fail(where, ": the sentencepiece library refuses it: ", status.ToString());
  }
  void encode(std::string_view word, std::vector<int32_t>& ids) const override {
    std::vector<int> found;
    const auto status = processor_.Encode({word.data(), word.size()}, &found);
    if (!status.ok())
      fail_machine("sentencepiece cannot encode a text of ", word.size(), " bytes: ", status.ToString());
    ids.insert(ids.end(), found.begin(), found.end());
  }

 private:
  sentencepiece::SentencePieceProcessor processor_;
};

}  // namespace

SentencePieces read_sentencepiece(const std::filesystem::path& file) {
  SentencePieces out;
  const std::string where = file.string();
  out.proto = read_file(file);
  std::vector<Piece> pieces;
  uint64_t model_type = unigram_model;
  for (Fields f(out.proto, where); f.next();) {
    if (f.number == 1) pieces.push_back(read_piece(f.bytes, where));
    if (f.number == 2)
      for (Fields trainer(f.bytes, where); trainer.next();) {
        if (trainer.number == 3) model_type = trainer.integer;
        if (trainer.number == 35) out.pipeline.model.byte_fallback = trainer.integer != 0;
      }
    if (f.number == 3)
      for (Fields normalizer(f.bytes, where); normalizer.next();) {
        if (normalizer.number == 2) out.maps_characters = !normalizer.bytes.empty();
        if (normalizer.number == 3) out.prefix_space = normalizer.integer != 0;
      }
  }
  if (pieces.empty()) fail(where, ": holds no sentencepiece pieces; bring the file again");
  if (model_type != unigram_model && model_type != bpe_model)
    fail(where, ": is a sentencepiece model of type ", model_type, "; unigram (1) and BPE (2) are supported");
  out.unigram = model_type == unigram_model;
  BpeFiles& model = out.pipeline.model;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    model.vocabulary.emplace(piece.text, static_cast<int32_t>(i));
    if (piece.type == unknown_piece) out.unknown = piece.text;
    if (piece.type != control_piece && piece.type != user_defined_piece) continue;
    AddedToken token;
    token.content = piece.text;
    token.id = static_cast<int32_t>(i);
    token.normalized = false;
    token.special = piece.type == control_piece;
    out.pipeline.added.push_back(std::move(token));
  }
  if (!out.unigram) model.merges = merges_of(pieces, model.vocabulary);
  model.fuse_unknown = true;
  return out;
}

std::unique_ptr<WordModel> make_sentencepiece_model(std::string proto, bool prefix_space, const std::string& where) {
  // A message that is given twice is merged: this appends normalizer_spec { add_dummy_prefix: false }.
  if (!prefix_space) proto.append({0x1A, 0x02, 0x18, 0x00});
  return std::make_unique<LibraryModel>(proto, where);
}

}  // namespace orpo

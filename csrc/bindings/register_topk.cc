// Selection: thresholds, masks, the sorted k largest, blocks and N:M groups.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>

#include "bindings/array.h"
#include "bindings/register.h"
#include "core/check.h"
#include "core/huge_pages.h"
#include "ops/topk.h"

namespace pared {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::f16, DType::bf16};

// Factors that repeat down the rows are repeated in memory up to this length, so that a kernel's run is long
// even where a row is short.
constexpr int64_t kFactorRun = 4096;

SelectKey parse_key(const std::string& name) {
  if (name == "abs") return SelectKey::abs;
  if (name == "identity") return SelectKey::identity;
  if (name == "square") return SelectKey::square;
  if (name == "abs_mul") return SelectKey::product;
  throw ValueError(str("key: expected one of abs, identity, square, abs_mul, got '", name, "'"));
}

NanRule parse_nan(const std::string& name, const char* argument) {
  PARED_CHECK(name == "raise" || name == "lowest", "nan: expected \"raise\" or \"lowest\", got '", name, "'");
  return {name == "raise", argument};
}

std::string item_name(const char* name, bool many, size_t i) { return many ? str(name, "[", i, "]") : name; }

// One tensor of a selection with its factors, validated; the objects stay alive through the call.
struct Source {
  Array w;
  SelectKey key;
  Array other;                   // of abs_mul with `other`
  const float* scale = nullptr;  // of abs_mul with `col_scale`: [scale_groups][cols]
  int64_t scale_groups = 1;
  // As a matrix: [rows][channels * taps]. A vector is one row.
  int64_t rows = 1, cols = 0, taps = 1;

  // Matrices that share one row of factors: one, or one for each group.
  int64_t parts() const { return scale ? scale_groups : 1; }
  SelectRows matrix(int64_t part) const {
    const int64_t part_rows = rows / parts();
    const int64_t stride = w.ndim >= 2 && w.shape[0] > 1 ? w.strides[0] : cols;
    SelectRows m{static_cast<const char*>(w.data) + part * part_rows * stride * dtype_size(w.dtype),
                 part_rows,
                 cols,
                 stride,
                 w.dtype,
                 key};
    if (scale) {
      m.g = scale + part * cols;
    } else if (key == SelectKey::product) {
      m.g = other.data;
      m.g_stride = other.ndim >= 2 && other.shape[0] > 1 ? other.strides[0] : cols;
      m.g_dtype = other.dtype;
    }
    return m;
  }
};

class Sources {
 public:
  // `rows`: tensors are matrices whose rows may be apart; otherwise they are contiguous.
  Sources(const py::list& tensors, const char* name, bool many, const std::string& key,
          const py::object& other, const py::object& col_scale, bool rows)
      : key_(parse_key(key)) {
    const bool has_other = !other.is_none(), has_scale = !col_scale.is_none();
    if (key_ == SelectKey::product) {
      PARED_CHECK(has_other != has_scale,
                  "key: expected exactly one of other and col_scale with 'abs_mul', got ",
                  has_other ? "both" : "neither");
    } else {
      PARED_CHECK(!has_other && !has_scale, has_other ? "other" : "col_scale",
                  ": expected with key='abs_mul' only, got key='", key, "'");
    }
    const auto factors = [&](const py::object& o, const char* what) {
      const auto list = py::reinterpret_borrow<py::list>(o);
      PARED_CHECK(list.size() == tensors.size(), what, ": expected ", tensors.size(),
                  " tensors, one for each of ", name, ", got ", list.size());
      return list;
    };
    py::list others, scales;
    if (has_other) others = factors(other, "other");
    if (has_scale) scales = factors(col_scale, "col_scale");
    for (size_t i = 0; i < tensors.size(); ++i) {
      Source s;
      s.w = parse_array(tensors[i], item_name(name, many, i).c_str());
      s.key = key_;
      require_dtype(s.w, kFloats);
      as_matrix(s, rows || has_scale);
      require_layout(s.w, rows);
      if (has_other) {
        s.other = parse_array(others[i], item_name("other", many, i).c_str());
        require_dtype(s.other, {s.w.dtype});
        PARED_CHECK(same_shape(s.other, s.w), s.other.name, ": expected the shape of ", s.w.name, ", ",
                    s.w.shape_text(), ", got ", s.other.shape_text());
        require_layout(s.other, rows);
      }
      if (has_scale) read_scale(s, parse_array(scales[i], item_name("col_scale", many, i).c_str()));
      items_.push_back(s);
    }
  }

  const std::vector<Source>& items() const { return items_; }

  // For the selections that see all elements in one line.
  std::vector<SelectMember> members() {
    std::vector<SelectMember> out;
    for (const Source& s : items_) {
      if (!s.scale) {
        out.push_back({s.w.data, s.w.size(), s.w.dtype, s.key, s.other.data, 0, s.other.dtype});
        continue;
      }
      for (int64_t part = 0; part < s.parts(); ++part) {
        const SelectRows m = s.matrix(part);
        const int64_t repeats =
            std::clamp<int64_t>(kFactorRun / std::max<int64_t>(m.cols, 1), 1, std::max<int64_t>(m.rows, 1));
        std::vector<float>& g = owned_.emplace_back(m.cols * repeats);
        for (int64_t r = 0; r < repeats; ++r)
          std::copy_n(static_cast<const float*>(m.g), m.cols, g.begin() + r * m.cols);
        out.push_back(
            {m.w, m.rows * m.cols, m.dtype, m.key, g.data(), static_cast<int64_t>(g.size()), DType::f32});
      }
    }
    return out;
  }

  // Masks for members(): pointers into `out`, checked against the tensors. `fresh`: just allocated for this
  // call.
  std::vector<uint8_t*> masks(const py::list& out, bool many, bool fresh) const {
    PARED_CHECK(out.size() == items_.size(), "out: expected ", items_.size(), " masks, got ", out.size());
    std::vector<uint8_t*> pointers;
    std::vector<Array> arrays;
    for (size_t i = 0; i < items_.size(); ++i) {
      const Source& s = items_[i];
      const Array a = parse_array(out[i], item_name("out", many, i).c_str());
      require_dtype(a, {DType::boolean});
      require_contiguous(a);
      require_writable(a);
      PARED_CHECK(same_shape(a, s.w), a.name, ": expected the shape of ", s.w.name, ", ", s.w.shape_text(),
                  ", got ", a.shape_text());
      for (const Source& other : items_) {
        require_disjoint(a, other.w);
        if (other.key == SelectKey::product && !other.scale) require_disjoint(a, other.other);
      }
      for (const Array& before : arrays) require_disjoint(a, before);
      arrays.push_back(a);
      if (fresh) advise_huge_pages(a.data, a.size());
      for (int64_t part = 0; part < s.parts(); ++part)
        pointers.push_back(static_cast<uint8_t*>(a.data) + part * (a.size() / s.parts()));
    }
    return pointers;
  }

 private:
  static bool same_shape(const Array& a, const Array& b) {
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
  }

  static void require_layout(const Array& a, bool rows) {
    if (rows && a.ndim == 2) {
      PARED_CHECK(a.size() == 0 || a.shape[1] == 1 || a.strides[1] == 1, a.name,
                  ": expected contiguous rows, got stride ", a.strides[1], "; ", a.copy_hint());
    } else {
      require_contiguous(a);
    }
  }

  static void as_matrix(Source& s, bool required) {
    if (s.w.ndim < 2) {
      PARED_CHECK(!required, s.w.name, ": expected [out, in] or [out, in/groups, ...taps], got ",
                  s.w.shape_text());
      s.cols = s.w.size();
      return;
    }
    s.rows = s.w.shape[0];
    for (int i = 2; i < s.w.ndim; ++i) s.taps *= s.w.shape[i];
    s.cols = s.w.shape[1] * s.taps;
  }

  void read_scale(Source& s, const Array& a) {
    require_dtype(a, {DType::f32});
    require_contiguous(a);
    const int64_t channels = s.w.shape[1];
    const int64_t width = a.ndim ? a.shape[a.ndim - 1] : -1, groups = a.ndim == 2 ? a.shape[0] : 1;
    PARED_CHECK((a.ndim == 1 || a.ndim == 2) && (width == s.cols || width == channels) && groups >= 1 &&
                    s.rows % groups == 0,
                a.name, ": expected [", channels, "] (one factor for each input)",
                s.taps > 1 ? str(", [", s.cols, "] (for each input and tap)") : std::string(),
                " or one such row for each group of outputs, got ", a.shape_text());
    const auto* in = static_cast<const float*>(a.data);
    for (int64_t i = 0; i < a.size(); ++i)
      PARED_CHECK(!(in[i] < 0.0f), a.name, ": expected non-negative factors, got ", in[i], " at ", i);
    s.scale_groups = groups;
    if (width == s.cols) {
      s.scale = in;
      return;
    }
    std::vector<float>& columns = owned_.emplace_back(groups * s.cols);
    for (int64_t i = 0; i < groups * s.cols; ++i) columns[i] = in[i / s.taps];
    s.scale = columns.data();
  }

  const SelectKey key_;
  std::vector<Source> items_;
  std::deque<std::vector<float>> owned_;
};

py::dict describe(const Threshold& t) {
  py::dict d;
  d["value"] = key_value(t.key);
  d["above"] = t.above;
  d["ties"] = t.ties;
  d["equal"] = t.equal;
  d["nans"] = t.nans;
  d["path"] = select_path_name(t.path);
  d["gathered"] = t.gathered;
  return d;
}

}  // namespace

void register_topk(py::module_& m) {
  m.def(
      "select_threshold",
      [](const py::list& scores, int64_t k, const std::string& key, const py::object& other,
         const py::object& col_scale, const std::string& nan, bool many) {
        Sources sources(scores, "scores", many, key, other, col_scale, false);
        const NanRule rule = parse_nan(nan, "scores");
        Threshold t;
        {
          py::gil_scoped_release unlocked;
          t = select_threshold(sources.members(), k, rule);
        }
        return describe(t);
      },
      py::arg("scores"), py::arg("k"), py::arg("key"), py::arg("other"), py::arg("col_scale"), py::arg("nan"),
      py::arg("many"));

  m.def(
      "topk_mask",
      [](const py::list& scores, int64_t k, const std::string& key, const py::object& other,
         const py::object& col_scale, const std::string& nan, bool many, const py::list& out, bool fresh) {
        Sources sources(scores, "scores", many, key, other, col_scale, false);
        const NanRule rule = parse_nan(nan, "scores");
        const std::vector<uint8_t*> masks = sources.masks(out, many, fresh);
        Threshold t;
        {
          py::gil_scoped_release unlocked;
          t = select_mask_global(sources.members(), k, rule, masks.data());
        }
        return describe(t);
      },
      py::arg("scores"), py::arg("k"), py::arg("key"), py::arg("other"), py::arg("col_scale"), py::arg("nan"),
      py::arg("many"), py::arg("out"), py::arg("fresh"));

  m.def(
      "topk_mask_rows",
      [](const py::list& scores, int64_t k, const std::string& key, const py::object& other,
         const py::object& col_scale, const std::string& nan, bool many, const py::list& out, bool fresh) {
        const Sources sources(scores, "scores", many, key, other, col_scale, true);
        const NanRule rule = parse_nan(nan, "scores");
        const std::vector<uint8_t*> masks = sources.masks(out, many, fresh);
        py::gil_scoped_release unlocked;
        auto mask = masks.begin();
        for (const Source& s : sources.items())
          PARED_CHECK(0 <= k && k <= s.cols, "k: expected 0 to ", s.cols, " (the length of a row of ",
                      s.w.name, "), got ", k);
        for (const Source& s : sources.items())
          for (int64_t part = 0; part < s.parts(); ++part) select_mask_rows(s.matrix(part), k, rule, *mask++);
      },
      py::arg("scores"), py::arg("k"), py::arg("key"), py::arg("other"), py::arg("col_scale"), py::arg("nan"),
      py::arg("many"), py::arg("out"), py::arg("fresh"));

  m.def(
      "topk",
      [](py::handle x, int64_t k, const std::string& key, const py::object& other, const std::string& nan,
         py::handle values, py::handle indices) {
        py::list tensors;
        tensors.append(x);
        Sources sources(tensors, "x", false, key, other, py::none(), false);
        const Array& a = sources.items()[0].w;
        PARED_CHECK(a.ndim == 1, "x: expected one dimension, got ", a.shape_text());
        const NanRule rule = parse_nan(nan, "x");
        PARED_CHECK(0 <= k && k <= a.size(), "k: expected 0 to ", a.size(), " (the number of elements), got ",
                    k);
        const Array v = parse_array(values, "values"), i = parse_array(indices, "indices");
        require_dtype(v, {a.dtype});
        require_dtype(i, {DType::i64});
        for (const Array* o : {&v, &i}) {
          require_shape(*o, {k});
          require_contiguous(*o);
          require_writable(*o);
          require_disjoint(*o, a);
        }
        require_disjoint(v, i);
        py::gil_scoped_release unlocked;
        select_sorted(sources.members()[0], k, rule, v.data, static_cast<int64_t*>(i.data));
      },
      py::arg("x"), py::arg("k"), py::arg("key"), py::arg("other"), py::arg("nan"), py::arg("values"),
      py::arg("indices"));

  m.def(
      "block_mask",
      [](const py::list& x, int64_t k, int64_t r, int64_t c, const std::string& key, const py::object& other,
         const py::object& col_scale, const std::string& nan, bool many, const py::list& out, bool fresh) {
        PARED_CHECK(r >= 1 && c >= 1, "block: expected two positive sizes, got (", r, ", ", c, ")");
        const Sources sources(x, "x", many, key, other, col_scale, true);
        const NanRule rule = parse_nan(nan, "x");
        const std::vector<uint8_t*> masks = sources.masks(out, many, fresh);
        std::vector<SelectRows> matrices;
        std::vector<BlockShape> shapes;
        int64_t total = 0;
        for (const Source& s : sources.items())
          for (int64_t part = 0; part < s.parts(); ++part) {
            PARED_CHECK(s.parts() == 1 || s.rows / s.parts() % r == 0, "block: expected ", r,
                        " to divide the rows of a group of col_scale, got ", s.rows / s.parts());
            matrices.push_back(s.matrix(part));
            shapes.push_back({r, c, std::max<int64_t>(s.taps, 1)});
            total += block_count(matrices.back(), shapes.back());
          }
        PARED_CHECK(0 <= k && k <= total, "k: expected 0 to ", total, " (the number of blocks), got ", k);
        Threshold t;
        {
          py::gil_scoped_release unlocked;
          const std::unique_ptr<float[]> scores(new float[total]);
          const std::unique_ptr<uint8_t[]> chosen(new uint8_t[total]);
          float* at = scores.get();
          for (size_t i = 0; i < matrices.size(); ++i) {
            block_scores(matrices[i], shapes[i], at);
            at += block_count(matrices[i], shapes[i]);
          }
          uint8_t* block = chosen.get();
          t = select_mask_global({{scores.get(), total, DType::f32, SelectKey::identity}}, k, rule, &block);
          for (size_t i = 0; i < matrices.size(); ++i) {
            expand_block_mask(matrices[i], shapes[i], block, masks[i]);
            block += block_count(matrices[i], shapes[i]);
          }
        }
        return describe(t);
      },
      py::arg("x"), py::arg("k"), py::arg("r"), py::arg("c"), py::arg("key"), py::arg("other"),
      py::arg("col_scale"), py::arg("nan"), py::arg("many"), py::arg("out"), py::arg("fresh"));

  m.def(
      "nm_mask",
      [](const py::list& x, int64_t n, int64_t group, const std::string& key, const py::object& other,
         const py::object& col_scale, const std::string& nan, bool many, const py::list& out, bool fresh) {
        PARED_CHECK(group >= 1 && n >= 0 && n <= group, "n, m: expected 0 <= n <= m and m >= 1, got ", n, ":",
                    group);
        const Sources sources(x, "x", many, key, other, col_scale, true);
        const NanRule rule = parse_nan(nan, "x");
        const std::vector<uint8_t*> masks = sources.masks(out, many, fresh);
        py::gil_scoped_release unlocked;
        auto mask = masks.begin();
        for (const Source& s : sources.items())
          for (int64_t part = 0; part < s.parts(); ++part)
            select_mask_groups(s.matrix(part), std::max<int64_t>(s.taps, 1), n, group, rule, *mask++);
      },
      py::arg("x"), py::arg("n"), py::arg("m"), py::arg("key"), py::arg("other"), py::arg("col_scale"),
      py::arg("nan"), py::arg("many"), py::arg("out"), py::arg("fresh"));

  m.def("select_sample_positions", &select_sample_positions, py::arg("n"));
}

}  // namespace pared

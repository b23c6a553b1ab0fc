"""Results of AdapterHub's ``adapters`` with its bottleneck adapters, on tiny models whose weights are a formula.

``python tests/support/adapterhub_numbers.py``, in an environment with ``adapters``, prints the table ``WANTED``, which
was computed with adapters 1.3.0, transformers 4.57.6 and torch 2.13.0. No weight is random or downloaded, so that the
weights do not depend on the versions of the libraries.
"""

import zlib

import torch
import transformers

_SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
_WHISPER = {
    "vocab_size": 11, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "num_mel_bins": 4,
    "max_source_positions": 3, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_SIZES), add_pooling_layer=False),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**_SIZES, pad_token_id=1), add_pooling_layer=False
    ),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(
            vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
        )
    ),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**_SIZES)),
    "t5": lambda: transformers.T5Model(
        transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    ),
    "whisper": lambda: transformers.WhisperModel(transformers.WhisperConfig(**_WHISPER)),
}
# For each placement, AdapterHub's configuration as in adapter_config.json.
CONFIGS = {
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "original_ln_after": True,
                 "non_linearity": "relu", "reduction_factor": 2},
    "houlsby": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "original_ln_after": True,
                "non_linearity": "swish", "reduction_factor": 2},
    "after_ffn": {"mh_adapter": False, "output_adapter": True, "original_ln_before": False, "original_ln_after": True,
                  "non_linearity": "relu", "reduction_factor": 2},
}  # fmt: skip


def numbers(name, shape, offset=0.0, scale=0.5):
    """Returns ``offset + scale · sin(0.7 i + c)``, where c is a checksum of ``name``."""
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.7 + zlib.crc32(name.encode()) % 1000
    return (offset + scale * torch.sin(steps)).reshape(shape).float()


def base(kind):
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(numbers(name, parameter.shape, 1.0 if norm else 0.0, 0.3))
    return model


def inputs(kind):
    ids = torch.tensor([[3, 5, 2, 7]])
    if kind == "whisper":
        return {"input_features": numbers("features", (1, 4, 6)), "decoder_input_ids": ids[:, :3]}
    return {"input_ids": ids, "decoder_input_ids": ids[:, :3]} if kind == "t5" else {"input_ids": ids}


def measured(model, kind, trained):
    """Returns the last hidden state, the second hidden state, and a directional derivative.

    The derivative is that of the weighted last hidden state along ``numbers`` of each tensor in ``trained``, which has
    the trained tensors by AdapterHub's names.
    """
    given = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs(kind).items()}
    y = model(**given).last_hidden_state
    y.backward(numbers("gradient", y.shape).to(y.dtype))
    slope = sum((p.grad.double() * numbers(name, p.shape).double()).sum().item() for name, p in trained.items())
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
    hidden = out.hidden_states if "hidden_states" in out else out.decoder_hidden_states
    return y.detach().flatten().tolist(), hidden[1][0, -1].tolist(), slope


def main():
    import adapters

    kinds = {
        "pfeiffer": adapters.SeqBnConfig(reduction_factor=2),
        "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=2),
        "after_ffn": adapters.SeqBnConfig(reduction_factor=2, original_ln_before=False),
    }
    print("WANTED = {")
    for kind in MODELS:
        for placement, config in kinds.items():
            for name, value in CONFIGS[placement].items():
                assert config[name] == value, (name, config[name])
            model = base(kind)
            adapters.init(model)
            model.add_adapter("a", config=config)
            model.set_active_adapters("a")
            model.eval()
            trained = {name: p for name, p in model.named_parameters() if ".adapters.a." in name}
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(numbers(name, parameter.shape))
            y, hidden, slope = measured(model, kind, trained)
            short = [[float(f"{value:.7g}") for value in values] for values in (y, hidden, [slope])]
            print(f"    ({kind!r}, {placement!r}): ({len(trained)}, {short[0]}, {short[1]}, {short[2][0]}),")
    print("}  # fmt: skip")


# Maps a model and a placement to the number of the adapter's tensors, and to the result of ``measured``.
WANTED = {
    ("bert", "pfeiffer"): (
        8, [-0.08074386, 1.169256, -0.03385552, 1.237717, -0.2401725, -0.2505914, 0.1786322, -2.524235,
        1.07525, -0.6950219, -0.2672926, 1.437064, 0.3659522, -0.8390375, 0.596622, -1.868756, 0.1690823,
        -1.163858, -0.6789826, 1.250978, 0.8284664, -0.7610195, 1.535286, -1.004503, 0.1747447, -1.162861,
        -0.6764454, 1.253514, 0.8263398, -0.7618877, 1.530592, -1.011682], [-0.3997933, -1.507709, -0.3367999,
        1.469967, -0.2290625, 0.5474246, 0.3258829, -1.01325], -2.089112,
    ),
    ("bert", "houlsby"): (
        16, [1.023875, 0.4618657, 0.3907461, 1.126062, -0.8175139, 0.3853167, -1.514237, -1.362977, 1.007099,
        0.1729084, 0.2365363, 1.43801, -0.5814641, 0.1339038, -0.9820334, -1.883986, 0.8620065, 0.04520359,
        0.07373908, 1.547462, -0.4516356, -0.07301567, -0.2257996, -2.227849, 0.8615682, 0.04657796,
        0.07380718, 1.548208, -0.4522546, -0.07147405, -0.2317661, -2.225245], [-0.2481993, -1.054312,
        0.03709209, 0.9395178, 0.4713754, -0.3932134, 0.8367932, -1.439033], -5.743579,
    ),
    ("bert", "after_ffn"): (
        8, [0.6903687, 0.9520448, 0.1528057, 1.260331, -0.5381493, -0.1322192, -0.815447, -2.047263,
        0.06428093, 0.2639381, -0.6023554, 1.605309, 0.2314836, -0.5945008, 0.7469414, -2.056976, -0.6382915,
        -0.2549714, -0.8295901, 1.399029, 0.6506951, -0.5235198, 1.641093, -1.507403, -0.6346182, -0.2526347,
        -0.8281518, 1.40093, 0.649015, -0.5245993, 1.637188, -1.512435], [-0.324309, -1.680488, -0.2005168,
        1.372007, -0.1377366, 0.4959847, 0.3707473, -1.052129], -1.953339,
    ),
    ("roberta", "pfeiffer"): (
        8, [-0.5597539, 0.7713401, 0.4350958, 1.387924, 0.1538007, 0.2400084, -0.9092768, -2.592244,
        -0.5964558, 0.6534646, 0.4477815, 1.443968, 0.1603786, 0.328597, -1.030132, -2.504179, -0.7929623,
        1.461858, -0.1859005, 1.148791, -0.6938726, 0.7534815, -1.060048, -0.9167249, -0.8337649, 0.7598827,
        0.1931634, 1.479962, -0.2954238, 0.8883359, -1.503087, -1.485306], [-0.9476457, -1.121053, -0.6667796,
        0.9393954, -0.5709699, 1.185394, 0.1175244, -0.3585206], 1.243283,
    ),
    ("roberta", "houlsby"): (
        16, [0.8977882, -0.06028628, 1.091034, 0.7967336, -0.4770536, 0.5621638, -1.649076, -1.721292,
        0.8800407, -0.09075306, 1.118729, 0.7821153, -0.4727318, 0.5788268, -1.623207, -1.736108, 0.470812,
        0.5070071, 1.005877, 0.6787214, -0.7405261, 0.8192959, -1.428759, -1.815464, 0.7218488, 0.05602035,
        1.115254, 0.747512, -0.589156, 0.717598, -1.536939, -1.778611], [-0.7849419, -0.8706254, -0.231004,
        0.7534599, 0.3359912, -0.01000582, 1.008363, -1.36459], -1.862295,
    ),
    ("roberta", "after_ffn"): (
        8, [-0.1232723, 0.5258199, 0.9255826, 1.09042, 0.1425422, 0.239858, -1.293741, -2.603642, -0.1715173,
        0.4088884, 0.9338251, 1.137841, 0.1794855, 0.2614255, -1.233247, -2.640232, 0.4696732, -0.2844275,
        1.088765, 0.7864766, -0.8854182, 1.074687, -0.7714967, -1.86312, -0.1886998, -0.1272801, 1.033183,
        1.223646, 0.0534007, 0.5357219, -1.005486, -2.600823], [-0.7389535, -1.953291, -0.06925365, 0.4712168,
        -0.1461703, 1.046402, 0.3660033, -0.5550629], -1.57376,
    ),
    ("gpt2", "pfeiffer"): (
        8, [0.3850153, 2.226586, 0.151862, 0.6974428, -1.369956, -1.242621, -0.5301975, -0.5701712, -1.191435,
        1.212402, -1.058918, 0.8265598, 0.4815974, -0.1018774, 1.272521, -0.8727089, 0.312263, 2.271888,
        -0.01314531, 0.4900562, -1.266912, -1.350469, -0.1814462, -0.57995, 0.01417027, 2.347076, -0.2623152,
        0.7462494, -1.121079, -1.177351, 0.01318892, -0.7003158], [0.6377279, 1.175251, 0.4531766,
        -0.07631905, -0.6276091, -1.180729, -0.5611572, -0.5440716], 18.30908,
    ),
    ("gpt2", "houlsby"): (
        16, [-0.6916836, 0.7403879, -0.3984295, 2.52049, -0.7751843, 1.307174, -1.415821, -0.4126081,
        -0.8751491, 0.5222757, -0.4954412, 2.528034, -0.499386, 1.489309, -1.237578, -0.4365679, -0.6129245,
        0.720551, -0.3358746, 2.493012, -0.8409177, 1.293494, -1.50891, -0.3736083, -0.8286196, 0.6547071,
        -0.456184, 2.551968, -0.5855357, 1.386019, -1.28406, -0.4667884], [-4.99922, 7.176577, -0.7594737,
        5.501175, -0.1686583, -1.991945, -0.6343198, -6.974411], -1.566416,
    ),
    ("gpt2", "after_ffn"): (
        8, [1.139474, 1.05521, 0.797087, 0.1273803, -1.603374, -0.7933868, -1.450904, 0.123298, 0.2869647,
        -0.5328685, -0.06804757, 1.049563, -1.121426, 1.491869, -1.71148, 0.6112992, 1.053428, 0.9261491,
        0.6824902, 0.4069352, -1.696848, -0.4322123, -1.658344, 0.2011635, 0.8987416, 0.2766227, 0.3730235,
        0.5675287, -1.676032, 0.3934264, -1.811093, 0.5267345], [0.6590124, 1.166799, 0.4478185, -0.05777048,
        -0.6572049, -1.143506, -0.6017059, -0.5048826], 10.90994,
    ),
    ("llama", "pfeiffer"): (
        8, [-0.2031484, 0.8076309, -1.174934, 0.7405221, -1.565101, 0.6004597, -0.4279996, 0.7420555,
        -0.2994768, 0.8284821, -1.247066, 0.7355474, -1.483954, 0.5227181, -0.2156935, 0.657281, 0.8906427,
        0.1173613, -0.3674997, 0.7024823, -1.631079, 1.029946, -1.58898, 1.30474, -0.810954, 0.8748637,
        -1.422184, 0.4720654, -0.9912006, 0.3276403, 0.4611981, 0.5536913], [1.016172, 0.8771289, -2.233892,
        -2.823357, -1.114996, -1.462937, 0.4904493, 3.07027], 3.532974,
    ),
    ("llama", "houlsby"): (
        16, [0.3332998, 0.7142694, -1.257133, -0.3101507, -1.411815, -1.007733, 0.9488471, 0.7723995,
        0.1965457, 0.6956618, -1.335044, -0.2656243, -1.324165, -0.9056799, 1.071977, 0.7698439, 0.7885699,
        0.7949257, -0.8568223, 0.1574862, -1.758758, -1.297241, 0.6755939, -0.2380773, -0.3485381, 0.5348431,
        -1.462973, -0.4500414, -0.7983045, -0.5170942, 1.414414, 1.05181], [1.864063, 1.043496, -2.30977,
        -2.770272, -1.924425, -1.774972, 0.2866352, 3.251755], 3.229626,
    ),
    ("llama", "after_ffn"): (
        8, [1.051789, 0.26826, -1.01344, -0.4861111, -1.322898, -1.034742, 0.6511248, 1.447374, 0.9515646,
        0.2209529, -1.124964, -0.4348407, -1.222121, -0.9249636, 0.7979293, 1.533802, 1.681501, 0.1795674,
        -0.2967312, 0.2437557, -1.802611, -1.135388, 0.1737219, -0.1047301, 0.1982009, 0.07337184, -1.31107,
        -0.6704321, -0.5670506, -0.2689698, 0.9754396, 2.126361], [1.357075, 0.5424367, -1.944086, -3.034788,
        -1.006371, -1.456203, 0.3691347, 3.292146], 1.0551,
    ),
    ("t5", "pfeiffer"): (
        16, [0.1329046, 0.617438, -1.216651, 0.4324381, -2.471527, -0.02489931, 0.4712479, -0.07055969,
        0.6310962, 0.05718188, -0.05123403, 0.2427577, -2.984447, 0.5069373, -0.2058238, -0.8366029,
        0.6392581, 0.2424092, -0.3611197, 0.2318799, -3.015203, 0.2032253, -0.1483505, -0.5361745],
        [0.5888811, 1.704012, 1.861154, 1.622494, -2.940931, 0.3143356, -2.389979, -2.65742], 5.819562,
    ),
    ("t5", "houlsby"): (
        32, [1.076411, -0.511503, 0.7795808, -1.415604, 0.005582819, -1.770481, 0.7665108, -0.3343236,
        1.010469, -0.504358, 1.250668, -1.102389, 0.1573468, -1.479877, 0.2189502, -0.8075287, 1.020115,
        -0.4444818, 1.178259, -1.124842, 0.07084423, -1.624435, 0.2954954, -0.8333732], [1.991067, 1.569618,
        4.040266, 1.147539, -2.281884, -0.8171391, -3.481263, -3.184659], 7.455848,
    ),
    ("t5", "after_ffn"): (
        16, [0.7369006, -0.05136967, -0.9102141, -1.280065, -1.553779, -0.7362722, 0.787384, 1.37919,
        0.8695768, -0.1044381, -0.6145222, -1.376504, -1.891541, -0.6480969, 0.5530689, 1.118843, 0.9275172,
        -0.05152584, -0.5968325, -1.309627, -1.919769, -0.7986247, 0.4947973, 1.053445], [2.991487, 1.298289,
        2.584218, 0.3013633, -3.160094, -1.699809, -2.071793, -2.332856], -1.140583,
    ),
    ("whisper", "pfeiffer"): (
        16, [-0.397933, -0.581926, 1.231959, -0.8566738, 1.056457, 0.6783156, -1.554239, 0.5843537,
        -0.009511063, -0.6855106, 1.254276, -1.609481, 1.394311, 0.01195569, -1.264281, 0.7589381, -0.3871668,
        -0.574169, 1.230107, -1.05304, 1.207773, 0.5361029, -1.478149, 0.6231159], [-1.380729, -3.330416,
        3.069348, -3.191682, 4.154159, 4.324256, -4.00447, 5.365564], -2.721686,
    ),
    ("whisper", "houlsby"): (
        32, [-1.452585, 1.597128, 0.4188737, 0.7652196, 0.5820771, 0.4381933, -0.9260398, -0.5061128,
        -1.163464, 1.784148, 0.2154964, 0.7755784, -0.1033422, 0.6690428, -1.369577, -0.1151212, -1.376269,
        1.655216, 0.2877242, 0.8739433, 0.3021713, 0.5703166, -1.086132, -0.3769313], [-9.175219, 2.915907,
        -1.793769, 3.545591, 2.403901, 5.038898, -1.015598, -2.049386], 0.337395,
    ),
    ("whisper", "after_ffn"): (
        16, [-1.188908, 0.8366784, 1.330584, -0.4116366, 1.314992, 0.3404834, -1.316247, -0.120216, -1.062426,
        1.20191, 1.174137, -0.8545113, 1.276623, 0.06351078, -1.385762, 0.1538552, -1.181597, 0.9032309,
        1.288872, -0.504896, 1.315794, 0.3002141, -1.32993, -0.05460727], [-5.759585, -0.2536851, 1.232836,
        -1.236607, 4.495852, 3.661315, -1.733648, 1.246018], 0.3507549,
    ),
}  # fmt: skip

if __name__ == "__main__":
    main()

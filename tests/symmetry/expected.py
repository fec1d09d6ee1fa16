"""The groups that a knowledgeable reader expects, for every family: units, blocks, and the weights that carry them.

The table is derived from the architectures, which the comments recall: what elementwise operators, sums and norms over
channels leave interchangeable is one group, from the rows that make it to the columns that read it; what is added or
multiplied is tied; what is split, reshaped or joined lies on part of an axis; inputs and outputs stay.
"""

from __future__ import annotations

# "name units [in blocks] = tensor:axis …": all groups, with every axis of a tensor of two or more dimensions.
# The shortcut of a wider stage pads its input's channels by zeros on both sides: 4 of the 8 channels of stage 1 are the
# stem's and 4 are new, 8 of the 16 of stage 2 are stage 1's and 8 are new; every block has a hidden conv1.
_CIFAR = """
    conv 4 = conv.weight:0 layers.0.conv1.weight:1 layers.0.conv2.weight:0 layers.1.conv1.weight:1
        layers.1.conv2.weight:0 layers.2.conv1.weight:1 layers.2.conv2.weight:0 head.weight:1
    layers.0.conv1 4 = layers.0.conv1.weight:0 layers.0.conv2.weight:1
    layers.1.conv1 8 = layers.1.conv1.weight:0 layers.1.conv2.weight:1
    layers.1.conv2 4 = layers.1.conv2.weight:0 layers.2.conv1.weight:1 layers.2.conv2.weight:0 head.weight:1
    layers.2.conv1 16 = layers.2.conv1.weight:0 layers.2.conv2.weight:1
    layers.2.conv2 8 = layers.2.conv2.weight:0 head.weight:1
"""

EXPECTED = {
    # the 12 inputs and 3 classes stay: the two hidden layers
    "mlp": """
        1 8 = 1.weight:0 3.weight:1
        3 6 = 3.weight:0 5.weight:1
    """,
    # two convolutions, the second's 5 channels of 9 pixels each on the 45 columns after the flatten, a hidden layer
    "lenet": """
        0 4 = 0.weight:0 3.weight:1
        3 5 = 3.weight:0 6.weight:1
        6 7 = 6.weight:0 8.weight:1
    """,
    # three convolutions, the last one's 8 channels of 2 x 2 pixels on 32 columns, a hidden layer
    "vgg": """
        0 6 = 0.weight:0 3.weight:1
        3 8 = 3.weight:0 6.weight:1
        6 8 = 6.weight:0 11.weight:1
        11 9 = 11.weight:0 14.weight:1
    """,
    # as above; the norms' parameters are vectors and follow their convolution
    "vgg-bn": """
        0 6 = 0.weight:0 4.weight:1
        4 8 = 4.weight:0 8.weight:1
        8 8 = 8.weight:0 14.weight:1
        14 9 = 14.weight:0 17.weight:1
    """,
    "cifar-batch": _CIFAR,
    "cifar-layer": _CIFAR,
    "cifar-group1": _CIFAR,
    # GroupNorm's two halves move as wholes. Padding puts the stream's 4 channels in the middle of 8 and those in the
    # middle of 16, so its halves meet the halves there: one pair for all of the stream, another for each conv1
    "cifar-group2": """
        conv.blocks 2 =
        conv 4 in conv.blocks = conv.weight:0 layers.0.conv1.weight:1 layers.0.conv2.weight:0 layers.1.conv1.weight:1
            layers.1.conv2.weight:0 layers.2.conv1.weight:1 layers.2.conv2.weight:0 head.weight:1
        layers.0.conv1.blocks 2 =
        layers.0.conv1 4 in layers.0.conv1.blocks = layers.0.conv1.weight:0 layers.0.conv2.weight:1
        layers.1.conv1.blocks 2 =
        layers.1.conv1 8 in layers.1.conv1.blocks = layers.1.conv1.weight:0 layers.1.conv2.weight:1
        layers.1.conv2 4 in conv.blocks = layers.1.conv2.weight:0 layers.2.conv1.weight:1 layers.2.conv2.weight:0
            head.weight:1
        layers.2.conv1.blocks 2 =
        layers.2.conv1 16 in layers.2.conv1.blocks = layers.2.conv1.weight:0 layers.2.conv2.weight:1
        layers.2.conv2 8 in conv.blocks = layers.2.conv2.weight:0 head.weight:1
    """,
    "cifar-instance": _CIFAR,
    # the skip (4) and the way up (5) lie side by side on the columns of `join`; transposed weights have inputs first
    "unet": """
        down1 4 = down1.weight:0 down2.weight:1 join.weight:1
        down2 6 = down2.weight:0 up.weight:0
        up 5 = up.weight:1 join.weight:1
        join 7 = join.weight:0 out.weight:1
    """,
    # half of the stem passes through, half feeds the branch
    "shuffle": """
        stem 4 = stem.weight:0 out.weight:1
        stem#2 4 = stem.weight:0 depth.weight:0 point.weight:1
        point 4 = point.weight:0 out.weight:1
    """,
    # all features before a layer lie on its columns: 4, then 4 + 3, then 4 + 3 + 3
    "dense": """
        stem 4 = stem.weight:0 convs.0.weight:1 convs.1.weight:1 head.weight:1
        convs.0 3 = convs.0.weight:0 convs.1.weight:1 head.weight:1
        convs.1 3 = convs.1.weight:0 head.weight:1
    """,
    # the residual stream with the branch's scale; the wide channels, which excitation multiplies; the squeeze
    "squeeze-excite": """
        stem 4 = scale:0 stem.weight:0 wide.weight:1 narrow.weight:0 head.weight:1
        wide 12 = wide.weight:0 depth.weight:0 squeeze.weight:1 excite.weight:0 narrow.weight:1
        squeeze 3 = squeeze.weight:0 excite.weight:1
    """,
    # the layer that is applied twice ties its rows to its columns
    "tied": """
        inward 6 = inward.weight:0 hidden.weight:0 hidden.weight:1 out.weight:1 again.weight:0 again.weight:1
    """,
    # features of both inputs side by side on the columns of `joint`, whose units both outputs read
    "two-heads": """
        image 5 = image.weight:0 joint.weight:1
        words 5 = words.weight:1 joint.weight:1
        joint 8 = joint.weight:0 a.weight:1 b.weight:1
    """,
    # the helper reads the body's units; its own are used in training mode only
    "auxiliary": """
        body 6 = body.weight:0 head.weight:1 helper.weight:1
        helper 5 = helper.weight:0 last.weight:1
    """,
    # four blocks move as wholes, their 2 inputs each and their 3 outputs each inside them
    "grouped": """
        0.blocks 4 =
        0 8 in 0.blocks = 0.weight:0 2.weight:1
        2 12 in 0.blocks = 2.weight:0 4.weight:1
    """,
    # GroupNorm's pairs lie inside the convolution's halves: one level is kept, the halves stay
    "grouped-norm": """
        0.blocks 4 =
        0.blocks#2 4 =
        0 8 in 0.blocks = 0.weight:0 3.weight:1
        0#2 8 in 0.blocks#2 = 0.weight:0 3.weight:1
        3 3 = 3.weight:0 4.weight:1
        3#2 3 = 3.weight:0 4.weight:1
    """,
    # three outputs per channel
    "depthwise-multiplier": """
        0.blocks 4 = 0.weight:0
        1 12 in 0.blocks = 1.weight:0 3.weight:1
    """,
    # as above, inputs first
    "transposed-grouped": """
        0.blocks 4 =
        0 8 in 0.blocks = 0.weight:0 2.weight:0
        2 12 in 0.blocks = 2.weight:1 4.weight:1
    """,
    # norm and PReLU follow their channels
    "one-dimensional": """
        0 8 = 0.weight:0 2.weight:0
        2 6 = 2.weight:1 4.weight:1
    """,
    # 4 channels of 8 voxels on the 32 columns after the flatten
    "three-dimensional": """
        0 4 = 0.weight:0 4.weight:1
        4 5 = 4.weight:0 6.weight:1
    """,
    # 4 rows per channel before the shuffle (3 units), 4 columns per channel after its inverse (4 units)
    "pixel-shuffle": """
        0 8 = 0.weight:0 2.weight:1
        2 3 = 2.weight:0 4.weight:1
        4 4 = 4.weight:0 7.weight:1
    """,
    # every block reads from blocks that cross its own: few orders remain
    "channel-shuffle": """
        0 4 = 0.weight:0 1.weight:1
        0#2 4 = 0.weight:0 1.weight:1
        0#3 4 = 0.weight:0 1.weight:1
        1 2 = 1.weight:0 4.weight:1
        1#2 2 = 1.weight:0 4.weight:1
        1#3 2 = 1.weight:0 4.weight:1
        4 4 = 4.weight:0 6.weight:1
        4#2 4 = 4.weight:0 6.weight:1
        4#3 4 = 4.weight:0 6.weight:1
    """,
    # a unit is a row of the first half with its gate, a row of the second half
    "glu": """
        0 6 = 0.weight:0 2.weight:1
    """,
    # pairs of linear units per output
    "maxout": """
        a.blocks 6 = o.weight:1
        a 12 in a.blocks = a.weight:0
    """,
    # both inputs have an axis of the weight, the outputs the third
    "bilinear": """
        a 6 = a.weight:0 m.weight:1
        b 5 = b.weight:0 m.weight:2
        m 7 = m.weight:0 o.weight:1
    """,
    # lengths and directions of the same 6 rows
    "weight-norm": """
        0 6 = 0.parametrizations.weight.original0:0 0.parametrizations.weight.original1:0 2.weight:1
    """,
    # 4 pixels of a patch per channel on the 24 columns
    "unfold": """
        0 6 = 0.weight:0 3.weight:1
        3 5 = 3.weight:0 5.weight:1
    """,
    # the embedding; per layer 8 units of four gate rows, columns of their own weight_hh and of the next layer
    "lstm": """
        tokens 6 = tokens.weight:1 layer.weight_ih_l0:1
        layer.l0 8 = layer.weight_ih_l0:0 layer.weight_hh_l0:0 layer.weight_hh_l0:1 layer.weight_ih_l1:1
        layer.l1 8 = layer.weight_ih_l1:0 layer.weight_hh_l1:0 layer.weight_hh_l1:1 head.weight:1
    """,
    # both directions read one embedding; their units lie side by side on the head's columns
    "lstm-bidirectional": """
        tokens 6 = tokens.weight:1 layer.weight_ih_l0:1 layer.weight_ih_l0_reverse:1
        layer.l0 8 = layer.weight_ih_l0:0 layer.weight_hh_l0:0 layer.weight_hh_l0:1 head.weight:1
        layer.l0_reverse 8 = layer.weight_ih_l0_reverse:0 layer.weight_hh_l0_reverse:0 layer.weight_hh_l0_reverse:1
            head.weight:1
    """,
    # cell units and projected hidden state apart
    "lstm-projected": """
        tokens 6 = tokens.weight:1 layer.weight_ih_l0:1
        layer.l0 8 = layer.weight_ih_l0:0 layer.weight_hh_l0:0 layer.weight_hr_l0:1
        layer.l0#2 3 = layer.weight_hh_l0:1 layer.weight_hr_l0:0 head.weight:1
    """,
    # as the LSTM, three gate rows per unit
    "gru": """
        tokens 6 = tokens.weight:1 layer.weight_ih_l0:1
        layer.l0 8 = layer.weight_ih_l0:0 layer.weight_hh_l0:0 layer.weight_hh_l0:1 head.weight:1
    """,
    # two directions in two layers: the second reads both directions of the first
    "rnn": """
        tokens 6 = tokens.weight:1 layer.weight_ih_l0:1 layer.weight_ih_l0_reverse:1
        layer.l0 8 = layer.weight_ih_l0:0 layer.weight_hh_l0:0 layer.weight_hh_l0:1 layer.weight_ih_l1:1
            layer.weight_ih_l1_reverse:1
        layer.l0_reverse 8 = layer.weight_ih_l0_reverse:0 layer.weight_hh_l0_reverse:0 layer.weight_hh_l0_reverse:1
            layer.weight_ih_l1:1 layer.weight_ih_l1_reverse:1
        layer.l1 8 = layer.weight_ih_l1:0 layer.weight_hh_l1:0 layer.weight_hh_l1:1 head.weight:1
        layer.l1_reverse 8 = layer.weight_ih_l1_reverse:0 layer.weight_hh_l1_reverse:0 layer.weight_hh_l1_reverse:1
            head.weight:1
    """,
    # residual stream; heads; queries with keys, and values with outputs, inside a head; hidden layer
    "gpt-packed": """
        tokens 12 = positions:2 tokens.weight:1 blocks.0.attn.qkv.weight:1 blocks.0.attn.o.weight:0
            blocks.0.mlp.up.weight:1 blocks.0.mlp.down.weight:0 head.weight:1
        blocks.0.attn.qkv.blocks 3 =
        blocks.0.attn.qkv 12 in blocks.0.attn.qkv.blocks = blocks.0.attn.qkv.weight:0
        blocks.0.attn.qkv#2 12 in blocks.0.attn.qkv.blocks = blocks.0.attn.qkv.weight:0 blocks.0.attn.o.weight:1
        blocks.0.mlp.up 20 = blocks.0.mlp.up.weight:0 blocks.0.mlp.down.weight:1
    """,
    # as packed, queries, keys and values in tensors of their own; the table is not the head
    "gpt-separate": """
        tokens 12 = positions:2 tokens.weight:1 blocks.0.attn.q.weight:1 blocks.0.attn.k.weight:1
            blocks.0.attn.v.weight:1 blocks.0.attn.o.weight:0 blocks.0.mlp.up.weight:1 blocks.0.mlp.down.weight:0
            head.weight:1
        blocks.0.attn.q.blocks 3 =
        blocks.0.attn.q 12 in blocks.0.attn.q.blocks = blocks.0.attn.q.weight:0 blocks.0.attn.k.weight:0
        blocks.0.attn.v 12 in blocks.0.attn.q.blocks = blocks.0.attn.v.weight:0 blocks.0.attn.o.weight:1
        blocks.0.mlp.up 20 = blocks.0.mlp.up.weight:0 blocks.0.mlp.down.weight:1
    """,
    # the rotation orders the entries of queries and keys inside a head
    "llama": """
        tokens 12 = tokens.weight:1 blocks.0.attn.q.weight:1 blocks.0.attn.k.weight:1 blocks.0.attn.v.weight:1
            blocks.0.attn.o.weight:0 blocks.0.mlp.gate.weight:1 blocks.0.mlp.up.weight:1 blocks.0.mlp.down.weight:0
            head.weight:1
        blocks.0.attn.q.blocks 3 = blocks.0.attn.q.weight:0 blocks.0.attn.k.weight:0
        blocks.0.attn.v 12 in blocks.0.attn.q.blocks = blocks.0.attn.v.weight:0 blocks.0.attn.o.weight:1
        blocks.0.mlp.gate 20 = blocks.0.mlp.gate.weight:0 blocks.0.mlp.up.weight:0 blocks.0.mlp.down.weight:1
    """,
    # one block per key head; queries move among those that share it, and inside each as their key's entries do
    "grouped-query": """
        tokens 24 = positions:2 tokens.weight:1 blocks.0.attn.q.weight:1 blocks.0.attn.k.weight:1
            blocks.0.attn.v.weight:1 blocks.0.attn.o.weight:0 blocks.0.mlp.up.weight:1 blocks.0.mlp.down.weight:0
            head.weight:1
        blocks.0.attn.q.blocks 2 =
        blocks.0.attn.q 6 in blocks.0.attn.q.blocks = blocks.0.attn.q.weight:0 blocks.0.attn.o.weight:1
        blocks.0.attn.k 8 in blocks.0.attn.q.blocks = blocks.0.attn.q.weight:0 blocks.0.attn.k.weight:0
        blocks.0.attn.v 8 in blocks.0.attn.q.blocks = blocks.0.attn.v.weight:0 blocks.0.attn.o.weight:1
        blocks.0.mlp.up 20 = blocks.0.mlp.up.weight:0 blocks.0.mlp.down.weight:1
    """,
    # the same network through the operator's own repetition of keys
    "grouped-query-native": """
        tokens 24 = positions:2 tokens.weight:1 blocks.0.attn.q.weight:1 blocks.0.attn.k.weight:1
            blocks.0.attn.v.weight:1 blocks.0.attn.o.weight:0 blocks.0.mlp.up.weight:1 blocks.0.mlp.down.weight:0
            head.weight:1
        blocks.0.attn.q.blocks 2 =
        blocks.0.attn.q 6 in blocks.0.attn.q.blocks = blocks.0.attn.q.weight:0 blocks.0.attn.o.weight:1
        blocks.0.attn.k 8 in blocks.0.attn.q.blocks = blocks.0.attn.q.weight:0 blocks.0.attn.k.weight:0
        blocks.0.attn.v 8 in blocks.0.attn.q.blocks = blocks.0.attn.v.weight:0 blocks.0.attn.o.weight:1
        blocks.0.mlp.up 20 = blocks.0.mlp.up.weight:0 blocks.0.mlp.down.weight:1
    """,
    # the rotation orders the entries of queries and keys, not the queries that share a key
    "grouped-query-rotary": """
        tokens 24 = tokens.weight:1 blocks.0.attn.q.weight:1 blocks.0.attn.k.weight:1
            blocks.0.attn.v.weight:1 blocks.0.attn.o.weight:0 blocks.0.mlp.up.weight:1 blocks.0.mlp.down.weight:0
            head.weight:1
        blocks.0.attn.k.blocks 2 = blocks.0.attn.k.weight:0
        blocks.0.attn.q 6 in blocks.0.attn.k.blocks = blocks.0.attn.q.weight:0 blocks.0.attn.o.weight:1
        blocks.0.attn.v 8 in blocks.0.attn.k.blocks = blocks.0.attn.v.weight:0 blocks.0.attn.o.weight:1
        blocks.0.mlp.up 20 = blocks.0.mlp.up.weight:0 blocks.0.mlp.down.weight:1
    """,
    "grouped-query-packed": """
        tokens 24 = positions:2 tokens.weight:1 blocks.0.attn.qkv.weight:1 blocks.0.attn.o.weight:0
            blocks.0.mlp.up.weight:1 blocks.0.mlp.down.weight:0 head.weight:1
        blocks.0.attn.qkv.blocks 2 =
        blocks.0.attn.qkv 8 in blocks.0.attn.qkv.blocks = blocks.0.attn.qkv.weight:0
        blocks.0.attn.qkv#2 8 in blocks.0.attn.qkv.blocks = blocks.0.attn.qkv.weight:0 blocks.0.attn.o.weight:1
        blocks.0.attn.qkv#3 6 in blocks.0.attn.qkv.blocks = blocks.0.attn.qkv.weight:0 blocks.0.attn.o.weight:1
        blocks.0.mlp.up 20 = blocks.0.mlp.up.weight:0 blocks.0.mlp.down.weight:1
    """,
    # one key head: nothing holds the queries together
    "multi-query": """
        tokens 12 = positions:2 tokens.weight:1 blocks.0.attn.q.weight:1 blocks.0.attn.k.weight:1
            blocks.0.attn.v.weight:1 blocks.0.attn.o.weight:0 blocks.0.mlp.up.weight:1 blocks.0.mlp.down.weight:0
            head.weight:1
        blocks.0.attn.q 3 = blocks.0.attn.q.weight:0 blocks.0.attn.o.weight:1
        blocks.0.attn.k 4 = blocks.0.attn.q.weight:0 blocks.0.attn.k.weight:0
        blocks.0.attn.v 4 = blocks.0.attn.v.weight:0 blocks.0.attn.o.weight:1
        blocks.0.mlp.up 20 = blocks.0.mlp.up.weight:0 blocks.0.mlp.down.weight:1
    """,
    # weights of shape (width, heads, size) share one inner order between heads
    "attention-einsum": """
        inward 12 = inward.weight:0 middle.q:0 middle.k:0 middle.v:0
        middle.q 3 = middle.q:1 middle.k:1 middle.v:1 middle.o:0
        middle.q#2 4 = middle.q:2 middle.k:2
        middle.v 4 = middle.v:2 middle.o:1
        middle.o 12 = middle.o:2 outward.weight:1
    """,
    # the input itself is the residual stream: only the heads are free
    "attention-module": """
        attn.in_proj.blocks 3 =
        attn.in_proj 12 in attn.in_proj.blocks = attn.in_proj_weight:0
        attn.in_proj#2 12 in attn.in_proj.blocks = attn.in_proj_weight:0 attn.out_proj.weight:1
    """,
    # as a GPT block; the packed projection holds q, k and v of all heads on one axis
    "encoder": """
        inward 12 = inward.weight:0 middle.layers.0.self_attn.in_proj_weight:1
            middle.layers.0.self_attn.out_proj.weight:0 middle.layers.0.linear1.weight:1
            middle.layers.0.linear2.weight:0 outward.weight:1
        middle.layers.0.self_attn.in_proj.blocks 3 =
        middle.layers.0.self_attn.in_proj 12 in middle.layers.0.self_attn.in_proj.blocks =
            middle.layers.0.self_attn.in_proj_weight:0
        middle.layers.0.self_attn.in_proj#2 12 in middle.layers.0.self_attn.in_proj.blocks =
            middle.layers.0.self_attn.in_proj_weight:0 middle.layers.0.self_attn.out_proj.weight:1
        middle.layers.0.linear1 20 = middle.layers.0.linear1.weight:0 middle.layers.0.linear2.weight:1
    """,
    # one layer feeds both sides and cross-attention joins them: one stream; 3 attentions, 2 hidden layers
    "encoder-decoder": """
        inward 12 = inward.weight:0 middle.encoder.layers.0.self_attn.in_proj_weight:1
            middle.encoder.layers.0.self_attn.out_proj.weight:0 middle.encoder.layers.0.linear1.weight:1
            middle.encoder.layers.0.linear2.weight:0 middle.decoder.layers.0.self_attn.in_proj_weight:1
            middle.decoder.layers.0.self_attn.out_proj.weight:0 middle.decoder.layers.0.multihead_attn.in_proj_weight:1
            middle.decoder.layers.0.multihead_attn.out_proj.weight:0 middle.decoder.layers.0.linear1.weight:1
            middle.decoder.layers.0.linear2.weight:0 outward.weight:1
        middle.encoder.layers.0.self_attn.in_proj.blocks 2 =
        middle.encoder.layers.0.self_attn.in_proj 12 in middle.encoder.layers.0.self_attn.in_proj.blocks =
            middle.encoder.layers.0.self_attn.in_proj_weight:0
        middle.encoder.layers.0.self_attn.in_proj#2 12 in middle.encoder.layers.0.self_attn.in_proj.blocks =
            middle.encoder.layers.0.self_attn.in_proj_weight:0 middle.encoder.layers.0.self_attn.out_proj.weight:1
        middle.encoder.layers.0.linear1 20 = middle.encoder.layers.0.linear1.weight:0
            middle.encoder.layers.0.linear2.weight:1
        middle.decoder.layers.0.self_attn.in_proj.blocks 2 =
        middle.decoder.layers.0.self_attn.in_proj 12 in middle.decoder.layers.0.self_attn.in_proj.blocks =
            middle.decoder.layers.0.self_attn.in_proj_weight:0
        middle.decoder.layers.0.self_attn.in_proj#2 12 in middle.decoder.layers.0.self_attn.in_proj.blocks =
            middle.decoder.layers.0.self_attn.in_proj_weight:0 middle.decoder.layers.0.self_attn.out_proj.weight:1
        middle.decoder.layers.0.multihead_attn.in_proj.blocks 2 =
        middle.decoder.layers.0.multihead_attn.in_proj 12 in middle.decoder.layers.0.multihead_attn.in_proj.blocks =
            middle.decoder.layers.0.multihead_attn.in_proj_weight:0
        middle.decoder.layers.0.multihead_attn.in_proj#2 12 in middle.decoder.layers.0.multihead_attn.in_proj.blocks =
            middle.decoder.layers.0.multihead_attn.in_proj_weight:0
            middle.decoder.layers.0.multihead_attn.out_proj.weight:1
        middle.decoder.layers.0.linear1 20 = middle.decoder.layers.0.linear1.weight:0
            middle.decoder.layers.0.linear2.weight:1
    """,
}

package access_test

import (
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// sample is one topic of the kind for node n.
func sample(k topic.Kind) topic.Topic {
	p := topic.Parsed{Node: "n", Kind: k, Namespace: "default", Name: "pump-1", Property: "speed", Regarding: "Pod", Rest: "alarm/x"}
	return p.Topic()
}

// TestMayPublishMatrix is the ACL of schemas/README.md, role by kind: c cloud,
// n the link of node n, o operator, m mapper, l local client, - nobody else.
func TestMayPublishMatrix(t *testing.T) {
	want := map[topic.Kind]string{
		topic.KindDesiredPod:           "c",
		topic.KindDesiredConfigMap:     "c",
		topic.KindDesiredSecret:        "c",
		topic.KindDesiredToken:         "c",
		topic.KindDesiredDevice:        "c",
		topic.KindDesiredTwin:          "c",
		topic.KindDesiredDigest:        "c",
		topic.KindReportedLink:         "n",
		topic.KindReportedNode:         "n",
		topic.KindReportedPod:          "n",
		topic.KindReportedDevice:       "nm",
		topic.KindReportedTarget:       "n",
		topic.KindReportedTwin:         "nm",
		topic.KindReportedDigest:       "n",
		topic.KindSet:                  "ml",
		topic.KindEventGap:             "n",
		topic.KindEventKubernetes:      "n",
		topic.KindEvent:                "nml",
		topic.KindSyncDesiredRequest:   "n",
		topic.KindSyncDesiredManifest:  "c",
		topic.KindSyncReportedRequest:  "c",
		topic.KindSyncReportedManifest: "n",
	}
	roles := []struct {
		letter string
		id     access.Identity
	}{
		{"c", access.Identity{Role: access.Cloud}},
		{"n", access.Identity{Role: access.Node, Name: "n"}},
		{"x", access.Identity{Role: access.Node, Name: "other"}},
		{"o", access.Identity{Role: access.Operator}},
		{"m", access.Identity{Role: access.Mapper, Name: "modbus"}},
		{"l", access.Identity{Role: access.Local}},
		{"-", access.Identity{}},
	}
	for _, k := range topic.Kinds() {
		allowed, ok := want[k]
		if !ok {
			t.Errorf("kind %s is not in the matrix", k)
		}
		for _, r := range roles {
			for _, here := range []string{"", "n"} {
				err := r.id.MayPublish(sample(k), here)
				if (err == nil) != strings.Contains(allowed, r.letter) {
					t.Errorf("%s on %s (here %q): %v", r.id, sample(k), here, err)
				}
			}
			if err := r.id.MayPublish(sample(k), "elsewhere"); err == nil {
				t.Errorf("%s may publish %s on another node's bus", r.id, sample(k))
			}
		}
	}
}

func TestMayPublishUsersTopics(t *testing.T) {
	for _, tc := range []struct {
		id access.Identity
		ok bool
	}{
		{access.Identity{Role: access.Cloud}, true},
		{access.Identity{Role: access.Operator}, true},
		{access.Identity{Role: access.Mapper, Name: "modbus"}, true},
		{access.Identity{Role: access.Local}, true},
		{access.Identity{Role: access.Node, Name: "n"}, false},
		{access.Identity{}, false},
	} {
		if err := tc.id.MayPublish("factory/hall-2/light", ""); (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.id, err)
		}
	}
}

// TestMayPublishSaysWhy: the text reaches the client as its reason string.
func TestMayPublishSaysWhy(t *testing.T) {
	for _, tc := range []struct {
		id    access.Identity
		topic topic.Topic
		here  string
		want  string
	}{
		{access.Identity{Role: access.Local}, "fl/n/reported/twin/default/pump-1/speed", "n", "publish a wish to fl/n/set/default/pump-1/speed"},
		{access.Identity{Role: access.Local}, "fl/n/desired/twin/default/pump-1/speed", "n", "written by the cloud, not by local; publish a wish to fl/n/set/default/pump-1/speed"},
		{access.Identity{Role: access.Mapper, Name: "m"}, "fl/n/reported/target/default/pump-1/speed", "n", "written by the node's agent, not by mapper/m"},
		{access.Identity{Role: access.Node, Name: "n"}, "fl/x/reported/node", "", "node n may publish below fl/n/ only"},
		{access.Identity{Role: access.Node, Name: "n"}, "factory/light", "", "node n may publish below fl/n/ only"},
		{access.Identity{Role: access.Local}, "fl/x/set/default/pump-1/speed", "n", "this is the bus of node n"},
		{access.Identity{Role: access.Cloud}, "fl/n/set/default/pump-1/speed", "", "written by local clients"},
		{access.Identity{Role: access.Cloud}, "fl/n/desired", "", "not a Fairlead topic"},
		{access.Identity{Role: access.Cloud}, "fl", "", "not a Fairlead topic"},
		{access.Identity{}, "a", "", "nobody may not publish"},
	} {
		err := tc.id.MayPublish(tc.topic, tc.here)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s on %s: %v; want %q", tc.id, tc.topic, err, tc.want)
		}
	}
}

func TestMaySubscribe(t *testing.T) {
	node := access.Identity{Role: access.Node, Name: "n"}
	for _, tc := range []struct {
		id     access.Identity
		filter topic.Filter
		ok     bool
	}{
		{access.Identity{Role: access.Cloud}, "#", true},
		{access.Identity{Role: access.Operator}, "fl/+/reported/#", true},
		{access.Identity{Role: access.Mapper, Name: "m"}, "fl/n/desired/device/#", true},
		{access.Identity{Role: access.Local}, "$share/g/fl/#", true},
		{access.Identity{}, "fl/n/reported/node", false},
		{node, "fl/n/desired/#", true},
		{node, "fl/n/#", true},
		{node, "fl/n/sync/desired/manifest", true},
		{node, "$share/g/fl/n/desired/#", true},
		{node, "$share/g/fl/x/desired/#", false},
		{node, "$share/g", false},
		{node, "$share/", false},
		{node, "#", false},
		{node, "+/#", false},
		{node, "fl/#", false},
		{node, "fl/+/desired/#", false},
		{node, "fl/x/desired/#", false},
		{node, "fl/n2/desired/#", false},
		{node, "factory/#", false},
		{node, "$SYS/#", false},
	} {
		if err := tc.id.MaySubscribe(tc.filter); (err == nil) != tc.ok {
			t.Errorf("%s on %q: %v", tc.id, tc.filter, err)
		}
	}
}

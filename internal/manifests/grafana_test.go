package manifests

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/stretchr/testify/require"
)

// The dashboard of promkeys has no field that Grafana does not know, and lacks none that Grafana
// requires: of the dashboard, of each panel's options, and of each query. Grafana itself does not
// run here.
func TestGrafana(t *testing.T) {
	plugins.RegisterDefaultPlugins()
	text, err := os.ReadFile("../../keystore/promkeys/dashboard.json")
	require.NoError(t, err)
	require.NoError(t, decodeStrictly(string(text)))
	var d board
	require.NoError(t, json.Unmarshal(text, &d))
	require.NoError(t, d.Validate())
	panels := 0
	for _, p := range d.Panels {
		if p.Panel != nil {
			panels++
			require.NotEmpty(t, p.Panel.Targets, *p.Panel.Title)
		}
	}
	require.Greater(t, panels, 10)

	for _, field := range []string{"showLegend", "expr", "uid", "schemaVersion"} { // at each level
		wrong := strings.ReplaceAll(string(text), `"`+field+`"`, `"`+field+`s"`)
		require.NotEqual(t, string(text), wrong)
		require.Error(t, decodeStrictly(wrong), field)
	}
}

// A board is a dashboard in the older form, which has panels. The file has this form, and Grafana
// imports both forms.
//
//lint:ignore SA1019 the file has this form
type board = dashboard.Dashboard

// decodeStrictly returns the errors of UnmarshalJSONStrict, which returns an empty list instead of
// nil, and then leaves the panels empty.
func decodeStrictly(text string) error {
	err := new(board).UnmarshalJSONStrict([]byte(text))
	if list, ok := err.(cog.BuildErrors); ok && len(list) == 0 {
		return nil
	}
	return err
}

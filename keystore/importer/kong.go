package importer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// A kongFile is what deck gateway dump writes.
type kongFile struct {
	Consumers []struct {
		Username string      `yaml:"username"`
		CustomID string      `yaml:"custom_id"`
		Keys     []yaml.Node `yaml:"keyauth_credentials"`
	} `yaml:"consumers"`
	Keys []yaml.Node `yaml:"keyauth_credentials"` // with the name of the consumer
}

type kongKey struct {
	ID        string   `yaml:"id"`
	Key       string   `yaml:"key"`
	CreatedAt int64    `yaml:"created_at"`
	TTL       int64    `yaml:"ttl"`
	Tags      []string `yaml:"tags"`
	Consumer  any      `yaml:"consumer"`
}

// maxKongFile is the largest YAML file, in bytes. A larger export must have rows.
const maxKongFile = 256 << 20

// kongRows reads an export of Kong: see Kong.
func kongRows(r io.Reader) iter.Seq2[row, error] {
	in := bufio.NewReaderSize(r, 64<<10)
	if isTable(in) {
		return table(in)
	}
	return func(yield func(row, error) bool) {
		text, err := io.ReadAll(io.LimitReader(in, maxKongFile+1))
		if err == nil && len(text) > maxKongFile {
			err = fmt.Errorf("the YAML has more than %d MiB: export rows in CSV", maxKongFile>>20)
		}
		if err != nil {
			yield(row{}, err)
			return
		}
		var file kongFile
		if yaml.Unmarshal(text, &file) != nil {
			// The text of the error may have a key.
			yield(row{}, errors.New("the export is neither rows in CSV or JSON nor the output of "+
				"deck gateway dump"))
			return
		}
		each := func(keys []yaml.Node, username, customID string) bool {
			for _, node := range keys {
				if !yield(kongRow(&node, username, customID)) {
					return false
				}
			}
			return true
		}
		for _, c := range file.Consumers {
			if !each(c.Keys, c.Username, c.CustomID) {
				return
			}
		}
		each(file.Keys, "", "")
	}
}

// isTable reports whether an export has rows. The first line of a CSV has the name key among its
// columns, and the first line of JSON rows is an object with a key.
func isTable(in *bufio.Reader) bool {
	head, _ := in.Peek(64 << 10)
	line, _, _ := bytes.Cut(bytes.TrimLeft(bytes.TrimPrefix(head, []byte("\xef\xbb\xbf")), " \t\r\n"),
		[]byte("\n"))
	if columns, ok := jsonColumns(bytes.TrimSpace(line)); ok {
		_, ok = columns["key"]
		return ok
	}
	for name := range strings.SplitSeq(strings.ToLower(string(line)), ",") {
		if strings.Trim(name, " \t\r\"") == "key" {
			return true
		}
	}
	return false
}

func kongRow(node *yaml.Node, username, customID string) (row, error) {
	var k kongKey
	if node.Decode(&k) != nil {
		return row{}, problemAt(node.Line, "the credential does not have the form of the export")
	}
	columns := map[string]string{
		"id": k.ID, "key": k.Key, "username": username, "custom_id": customID,
		"tags": strings.Join(k.Tags, ","),
	}
	switch c := k.Consumer.(type) {
	case string:
		columns["consumer"] = c
	case map[string]any:
		columns["consumer"], _ = c["id"].(string)
	}
	if k.CreatedAt != 0 {
		columns["created_at"] = strconv.FormatInt(k.CreatedAt, 10)
	}
	if k.TTL != 0 {
		columns["ttl"] = strconv.FormatInt(k.TTL, 10)
	}
	return row{place: fmt.Sprintf("line %d", node.Line), columns: columns}, nil
}
